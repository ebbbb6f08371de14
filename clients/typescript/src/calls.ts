import {
  type CallOptions,
  type ClientReadableStream,
  type MethodDefinition,
  Metadata,
  type ServiceError,
} from "@grpc/grpc-js";

import {
  ExportServiceClient,
  ExportServiceDefinition,
  ExportServiceService,
} from "./gen/exportd/v1/export_service.js";

type Methods = ExportServiceDefinition["methods"];

/**
 * What one call may be given: metadata, and gRPC's call options. Interceptors are not among
 * them: they would take the place of the client's own, which send the token.
 */
export interface CallSettings extends Omit<
  CallOptions,
  "interceptors" | "interceptor_providers"
> {
  readonly metadata?: Metadata;
}

/** What a call with one answer may be given besides. */
export interface SingleCallSettings extends CallSettings {
  /** Ends it early, with the signal's reason. */
  readonly signal?: AbortSignal | undefined;
}

type Call<Method> = Method extends {
  requestType: { fromPartial(object: infer Request): unknown };
  responseType: { fromPartial(object: never): infer Response };
  responseStream: infer Streams;
}
  ? Streams extends true
    ? (request: Request, settings?: CallSettings) => ClientReadableStream<Response>
    : (request: Request, settings?: SingleCallSettings) => Promise<Response>
  : never;

/**
 * The methods of the service. Requests need only the fields that matter. Methods with one
 * answer give a promise of it; the others a stream, to be read with `for await`. Both fail
 * with gRPC's own `ServiceError`.
 */
export type Calls = { readonly [Name in keyof Methods]: Call<Methods[Name]> };

/** A connection to one server. */
export interface Client extends Calls {
  /** The generated stub, with callbacks. */
  readonly stub: ExportServiceClient;

  /** End the connection; calls under way go on to their end. */
  close(): void;
}

/** The calls of a stub. */
export function clientOf(stub: ExportServiceClient): Client {
  const client: Record<string, unknown> = {
    stub,
    close: () => {
      stub.close();
    },
  };
  for (const [name, { requestType }] of Object.entries(ExportServiceDefinition.methods)) {
    const method = ExportServiceService[name as keyof Methods] as unknown as MethodDefinition<
      unknown,
      unknown
    >;
    const complete = (request: unknown): unknown => requestType.fromPartial(request as never);
    client[name] = method.responseStream
      ? streaming(stub, method, complete)
      : single(stub, method, complete);
  }
  return client as unknown as Client;
}

function single(
  stub: ExportServiceClient,
  method: MethodDefinition<unknown, unknown>,
  complete: (request: unknown) => unknown,
) {
  return async (request: unknown, settings: SingleCallSettings = {}): Promise<unknown> => {
    const { metadata = new Metadata(), signal, ...options } = settings;
    signal?.throwIfAborted();
    return new Promise((resolve, reject) => {
      const cancel = () => {
        call.cancel();
      };
      const call = stub.makeUnaryRequest(
        method.path,
        method.requestSerialize,
        method.responseDeserialize,
        complete(request),
        metadata,
        options,
        (error: ServiceError | null, response?: unknown) => {
          signal?.removeEventListener("abort", cancel);
          if (signal?.aborted) reject(signal.reason as Error);
          else if (error) reject(error);
          else resolve(response);
        },
      );
      signal?.addEventListener("abort", cancel);
    });
  };
}

function streaming(
  stub: ExportServiceClient,
  method: MethodDefinition<unknown, unknown>,
  complete: (request: unknown) => unknown,
) {
  return (request: unknown, settings: CallSettings = {}): ClientReadableStream<unknown> => {
    const { metadata = new Metadata(), ...options } = settings;
    return stub.makeServerStreamRequest(
      method.path,
      method.requestSerialize,
      method.responseDeserialize,
      complete(request),
      metadata,
      options,
    );
  };
}
