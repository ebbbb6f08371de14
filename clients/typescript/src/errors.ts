import { type ServiceError, status } from "@grpc/grpc-js";

import { ErrorInfo, RetryInfo } from "./gen/google/rpc/error_details.js";
import { Status } from "./gen/google/rpc/status.js";

const DOMAIN = "exportd";
const DETAILS = "grpc-status-details-bin";

/**
 * The downloaded bytes do not match their checksums, whatever was tried. `code` is that of
 * the error by which the server tells the same of its own store.
 */
export class VerificationError extends Error {
  override readonly name = "VerificationError";
  readonly code = status.DATA_LOSS;
}

/** The same, of bytes that are in the file: only from the start can it be made good. */
export class Spoiled extends VerificationError {}

/** Whether a gRPC call failed, and not something on this machine. */
export function isServiceError(error: unknown): error is ServiceError {
  return error instanceof Error && "code" in error && "metadata" in error;
}

/**
 * The `reason` of an error of exportd's, such as `JOB_NOT_FOUND`: a name of `ErrorReason`.
 * Empty for errors that did not come from the service.
 */
export function reason(error: unknown): string {
  return errorInfo(error)?.reason ?? "";
}

/** The `google.rpc.ErrorInfo` of an error of exportd's: its reason, and what belongs to it. */
export function errorInfo(error: unknown): ErrorInfo | undefined {
  return details(error, "ErrorInfo", ErrorInfo).find(({ domain }) => domain === DOMAIN);
}

/** Milliseconds after which the server wants to be asked again, if it says so. */
export function retryAfter(error: unknown): number | undefined {
  const wait = details(error, "RetryInfo", RetryInfo)[0]?.retryDelay;
  return wait && Number(wait.seconds) * 1000 + wait.nanos / 1_000_000;
}

function details<T>(
  error: unknown,
  name: string,
  type: { decode(input: Uint8Array): T },
): readonly T[] {
  if (!isServiceError(error)) return [];
  try {
    return error.metadata
      .get(DETAILS)
      .flatMap((value) => Status.decode(Buffer.from(value)).details)
      .filter(({ typeUrl }) => typeUrl.endsWith(`/google.rpc.${name}`))
      .map(({ value }) => type.decode(value));
  } catch {
    return []; // details that cannot be read must not hide the error they belong to
  }
}

// What proxies and broken connections answer with. With a reason of exportd's it would be
// an answer; without one the stream was merely cut.
const CUT = new Set([
  status.INTERNAL,
  status.UNKNOWN,
  status.CANCELLED,
  status.ABORTED,
  status.DEADLINE_EXCEEDED,
  status.RESOURCE_EXHAUSTED,
]);

/** Whether a stream that ended with this error may go on when it is opened again. */
export function isCut(error: unknown): boolean {
  if (!isServiceError(error)) return false;
  if (error.code === status.UNAVAILABLE) return true;
  const why = reason(error);
  if (why === "QUOTA_EXCEEDED") return retryAfter(error) !== undefined;
  return why === "READER_STALLED" || (why === "" && CUT.has(error.code));
}
