/** Client of exportd: the contract's messages and service, and a helper for what is hard. */

export { type Calls, type CallSettings, type Client } from "./calls.js";
export { connect, type ConnectOptions } from "./connect.js";
export { download, type Download, type DownloadOptions } from "./download.js";
export { errorInfo, isServiceError, reason, VerificationError } from "./errors.js";
export { date, timestamp } from "./time.js";
export { watch, type WatchOptions } from "./watch.js";

export * from "./gen/exportd/v1/audit.js";
export * from "./gen/exportd/v1/dataset.js";
export * from "./gen/exportd/v1/error.js";
export * from "./gen/exportd/v1/export_service.js";
export * from "./gen/exportd/v1/job.js";
export * from "./gen/exportd/v1/sink.js";
export { Any } from "./gen/google/protobuf/any.js";
export { Duration } from "./gen/google/protobuf/duration.js";
export { Timestamp } from "./gen/google/protobuf/timestamp.js";
export {
  BadRequest,
  ErrorInfo,
  PreconditionFailure,
  QuotaFailure,
  RetryInfo,
} from "./gen/google/rpc/error_details.js";
export { Status } from "./gen/google/rpc/status.js";
