/** A server in this process that holds one finished job and does what a test wants of it. */

import { createHash } from "node:crypto";
import { EventEmitter } from "node:events";

import {
  type handleServerStreamingCall,
  type handleUnaryCall,
  Metadata,
  Server,
  ServerCredentials,
  type status,
} from "@grpc/grpc-js";
import { crc32c } from "@node-rs/crc32";
import {
  Any,
  type CreateExportRequest,
  type CreateExportResponse,
  ErrorInfo,
  ExportServiceService,
  type GetJobRequest,
  GetJobResponse,
  Job,
  JobState,
  RetryInfo,
  Status,
  type StreamDownloadRequest,
  StreamDownloadResponse,
  type WatchJobRequest,
  WatchJobResponse,
} from "exportd";

const CHUNK = 1000;

/**
 * The error of a call: a code of gRPC's and, if it is an answer, a reason of exportd's and the
 * milliseconds after which to ask again.
 */
export function failure(code: status, why = "", retryAfter?: number): object {
  const metadata = new Metadata();
  const details: Any[] = [];
  const add = (name: string, value: Uint8Array) =>
    details.push(Any.fromPartial({ typeUrl: `type.googleapis.com/google.rpc.${name}`, value }));
  if (why) {
    const info = ErrorInfo.fromPartial({ reason: why, domain: "exportd" });
    add("ErrorInfo", ErrorInfo.encode(info).finish());
  }
  if (retryAfter !== undefined) {
    const info = RetryInfo.fromPartial({ retryDelay: { nanos: retryAfter * 1_000_000 } });
    add("RetryInfo", RetryInfo.encode(info).finish());
  }
  if (details.length > 0) {
    const encoded = Status.encode(Status.fromPartial({ code, details })).finish();
    metadata.set("grpc-status-details-bin", Buffer.from(encoded));
  }
  return { code, details: why ? `[${why}] so it is` : "so it is", metadata };
}

/** A part, and how many of its first bytes the joined file leaves out when others precede. */
export interface PartOf {
  readonly data: Buffer;
  readonly prefix?: number;
}

/** A job that has succeeded with these parts. */
export function jobOf(parts: readonly PartOf[], generation = 1n): Job {
  const joined = join(parts);
  return Job.fromPartial({
    jobId: "01890a5d-ac96-774b-bcce-b302099a8057",
    state: JobState.SUCCEEDED,
    generation,
    manifest: {
      bytes: joined.length,
      crc32c: crc32c(joined),
      joinable: true,
      sha256: parts.length === 1 ? sha256(joined) : new Uint8Array(),
      parts: parts.map(({ data, prefix = 0 }, index) => ({
        index,
        bytes: data.length,
        crc32c: crc32c(data),
        sha256: sha256(data),
        prefixBytes: prefix,
      })),
    },
  });
}

/** The file that the parts make together. */
export function join(parts: readonly PartOf[]): Buffer {
  return Buffer.concat(
    parts.map(({ data, prefix = 0 }, index) => data.subarray(index === 0 ? 0 : prefix)),
  );
}

export type Message = ReturnType<typeof StreamDownloadResponse.fromPartial>;

export class ScriptedServer {
  job = jobOf([{ data: Buffer.from("nothing") }]);
  data: Buffer = Buffer.from("nothing");

  /** Requests of each method, as they came. */
  readonly seen = {
    createExport: [] as CreateExportRequest[],
    getJob: [] as GetJobRequest[],
    streamDownload: [] as StreamDownloadRequest[],
    watchJob: [] as WatchJobRequest[],
  };

  /** Where it serves, once it is started. */
  address = "";

  /** Tells of requests: `getJob`. */
  readonly heard = new EventEmitter();

  /** Whether GetJob never answers. */
  silent = false;

  /** Errors to answer with, one a call, before all goes well. */
  readonly errors = { createExport: [] as object[], getJob: [] as object[] };

  /** One a stream: may change a message, or give the error to end with in its place. */
  readonly meddle: ((message: Message) => Message | { error: object })[] = [];

  /** What each stream of WatchJob does: its jobs, and the error it ends with. */
  readonly watches: { jobs: Job[]; error?: object }[] = [];

  private readonly server = new Server();

  /** Serve on a port of loopback. */
  async start(): Promise<void> {
    this.server.addService(ExportServiceService, {
      createExport: this.createExport,
      getJob: this.getJob,
      streamDownload: this.streamDownload,
      watchJob: this.watchJob,
    });
    const credentials = ServerCredentials.createInsecure();
    return new Promise((resolve, reject) => {
      this.server.bindAsync("127.0.0.1:0", credentials, (error, port) => {
        if (error) reject(error);
        else {
          this.address = `127.0.0.1:${String(port)}`;
          resolve();
        }
      });
    });
  }

  stop(): void {
    this.server.forceShutdown();
  }

  private readonly createExport: handleUnaryCall<CreateExportRequest, CreateExportResponse> = (
    call,
    answer,
  ) => {
    this.seen.createExport.push(call.request);
    const error = this.errors.createExport.shift();
    answer(error ?? null, { job: this.job });
  };

  private readonly getJob: handleUnaryCall<GetJobRequest, GetJobResponse> = (call, answer) => {
    this.seen.getJob.push(call.request);
    this.heard.emit("getJob");
    if (this.silent) return;
    const error = this.errors.getJob.shift();
    answer(error ?? null, GetJobResponse.fromPartial({ job: this.job }));
  };

  private readonly streamDownload: handleServerStreamingCall<
    StreamDownloadRequest,
    StreamDownloadResponse
  > = (call) => {
    this.seen.streamDownload.push(call.request);
    const meddle = this.meddle.shift() ?? ((message: Message) => message);
    call.write(StreamDownloadResponse.fromPartial({ metadata: { generation: 1n } }));
    for (let at = Number(call.request.readOffset); at < this.data.length; at += CHUNK) {
      const data = this.data.subarray(at, at + CHUNK);
      const message = meddle(
        StreamDownloadResponse.fromPartial({ offset: at, crc32c: crc32c(data), data }),
      );
      if ("error" in message) {
        call.emit("error", message.error);
        return;
      }
      call.write(message);
    }
    call.end();
  };

  private readonly watchJob: handleServerStreamingCall<WatchJobRequest, WatchJobResponse> = (
    call,
  ) => {
    this.seen.watchJob.push(call.request);
    const { jobs, error } = this.watches.shift() ?? { jobs: [this.job] };
    for (const job of jobs) call.write(WatchJobResponse.fromPartial({ job }));
    if (error) call.emit("error", error);
    else call.end();
  };
}

function sha256(data: Buffer): Buffer {
  return createHash("sha256").update(data).digest();
}
