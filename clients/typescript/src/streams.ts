import type { ClientReadableStream } from "@grpc/grpc-js";

const STALL_MS = 60_000;

/**
 * The messages of a stream, which is given up as cut when it is silent for a minute, and
 * always ended when the reader leaves. Throws gRPC's error, or the signal's reason.
 */
export async function* messages<T>(
  stream: ClientReadableStream<T>,
  signal: AbortSignal | undefined,
): AsyncGenerator<T, void, undefined> {
  const cancel = () => {
    stream.cancel();
  };
  // An error that comes when nobody reads any more must not end the process.
  stream.on("error", () => undefined);
  let stall = setTimeout(cancel, STALL_MS);
  signal?.addEventListener("abort", cancel);
  try {
    signal?.throwIfAborted(); // an event that has been is not heard of
    for await (const message of stream as AsyncIterable<T>) {
      signal?.throwIfAborted(); // what has come already would hold it up
      clearTimeout(stall); // the reader may take its time
      yield message;
      stall = setTimeout(cancel, STALL_MS);
    }
  } catch (error) {
    signal?.throwIfAborted();
    throw error;
  } finally {
    signal?.removeEventListener("abort", cancel);
    clearTimeout(stall);
    cancel();
  }
}
