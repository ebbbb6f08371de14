import { readFileSync } from "node:fs";
import { isIPv4 } from "node:net";

import {
  ChannelCredentials,
  type ChannelOptions,
  credentials,
  InterceptingCall,
  type Interceptor,
} from "@grpc/grpc-js";

import contract from "../service_config.json" with { type: "json" };
import { type Client, clientOf } from "./calls.js";
import {
  ExportServiceClient,
  ExportServiceDefinition,
} from "./gen/exportd/v1/export_service.js";

/** How to reach a server. */
export interface ConnectOptions {
  /**
   * False, the default: plaintext. True: TLS, trusting the authorities that Node trusts. Or
   * TLS that trusts the authorities in the PEM file `ca`. Or credentials of gRPC's own, for
   * example with a client certificate.
   */
  readonly tls?: boolean | { readonly ca: string } | ChannelCredentials;
  /** An API key or a token, sent as `authorization: Bearer` with every call. */
  readonly token?: string;
  /** Send the token in plaintext to another machine, too. Whoever is in between can read it. */
  readonly allowPlaintextToken?: boolean;
  /** Milliseconds that a call with one answer may take, retries included. Default 30 000. */
  readonly timeout?: number;
  /** Added to the client's own gRPC channel options, or in their place. */
  readonly channelOptions?: ChannelOptions;
}

const CHANNEL_OPTIONS: ChannelOptions = {
  // A download carries up to 2 MiB a message, a page of 1 000 jobs can be larger.
  "grpc.max_receive_message_length": 16 * 1024 * 1024,
  // Notice a peer that vanished without a word. Pings go out only while a call is open, and
  // rarely enough for a server with gRPC's default ping policy.
  "grpc.keepalive_time_ms": 30_000,
  "grpc.keepalive_timeout_ms": 10_000,
  "grpc.keepalive_permit_without_calls": 0,
  // The defaults, 1 s and 120 s, would leave retries to hear the old failure repeated.
  "grpc.initial_reconnect_backoff_ms": 100,
  "grpc.max_reconnect_backoff_ms": 2_000,
  // Retries come from the contract, not from what a DNS server says.
  "grpc.service_config_disable_resolution": 1,
  // Node's default of 64 KiB would make a sender wait for every sixteenth of a message.
  "grpc-node.flow_control_window": 4 * 1024 * 1024,
};

/**
 * A client of the server at `address` (`host:port`, or any target of gRPC's). Nothing is
 * dialled before the first call. Throws a `TypeError` when the token cannot be one; and when it
 * would leave the machine in plaintext, and when the file of authorities cannot be read.
 */
export function connect(address: string, options: ConnectOptions = {}): Client {
  const { tls = false, token, timeout = 30_000 } = options;
  if (token !== undefined && !/^[!-~]+$/.test(token)) {
    throw new TypeError(
      "token is empty or has a blank in it; give it as it was issued, on one line",
    );
  }
  const channel = channelCredentials(tls);
  if (token && !channel._isSecure() && !isLoopback(address) && !options.allowPlaintextToken) {
    throw new Error(
      `token: would be sent to ${address} in plaintext; use TLS (tls), or set allowPlaintextToken`,
    );
  }
  const stub = new ExportServiceClient(address, channel, {
    ...CHANNEL_OPTIONS,
    "grpc.service_config": JSON.stringify(serviceConfig()),
    // A proxy from the environment cannot know this machine's own ports.
    ...(isLoopback(address) && { "grpc.enable_http_proxy": 0 }),
    ...options.channelOptions,
    interceptors: [inTime(timeout), ...(token ? [bearer(token)] : [])],
  });
  return clientOf(stub);
}

// `dns://SERVER/NAME` is not among them: whoever runs that server says where it leads.
const LOOPBACK = /^(?:dns:(?:\/\/\/)?|ipv4:|ipv6:)?(localhost|127\.[\d.]+|\[::1\])(?::\d+)?$/;

/** Whether a gRPC target leads to this machine and no other. */
export function isLoopback(address: string): boolean {
  if (address.startsWith("unix:")) return true;
  const host = LOOPBACK.exec(address)?.[1] ?? "";
  return isIPv4(host) || host === "localhost" || host === "[::1]";
}

function channelCredentials(tls: NonNullable<ConnectOptions["tls"]>): ChannelCredentials {
  if (tls instanceof ChannelCredentials) return tls;
  if (typeof tls === "object") return credentials.createSsl(readFileSync(tls.ca));
  return tls ? credentials.createSsl() : credentials.createInsecure();
}

/**
 * The retries of the contract, without those of its streams: `watch` and `download` open
 * these anew by themselves, and the waits of both would multiply.
 */
function serviceConfig(): typeof contract {
  const streams = new Set<string>();
  for (const method of Object.values(ExportServiceDefinition.methods)) {
    if (method.responseStream) streams.add(method.name);
  }
  const methodConfig = contract.methodConfig.map((entry) => ({
    ...entry,
    name: entry.name.filter(({ method }) => !streams.has(method)),
  }));
  return { ...contract, methodConfig };
}

/** Gives calls with one answer a deadline, `timeout` milliseconds from now, unless they have one. */
function inTime(timeout: number): Interceptor {
  return (options, nextCall) => {
    if (options.method_definition.responseStream)
      return new InterceptingCall(nextCall(options));
    const deadline = options.deadline ?? Date.now() + timeout;
    return new InterceptingCall(nextCall({ ...options, deadline }));
  };
}

function bearer(token: string): Interceptor {
  return (options, nextCall) =>
    new InterceptingCall(nextCall(options), {
      start: (metadata, listener, next) => {
        metadata.set("authorization", `Bearer ${token}`);
        next(metadata, listener);
      },
    });
}
