import { Attempts } from "./attempts.js";
import type { Client } from "./calls.js";
import { isCut } from "./errors.js";
import { type Job, JobState } from "./gen/exportd/v1/job.js";
import { messages } from "./streams.js";

/** How to follow a job. */
export interface WatchOptions {
  /** End only when the job's deliveries have ended, too. */
  readonly untilDelivered?: boolean;
  /** Ends it early, with the signal's reason. */
  readonly signal?: AbortSignal;
}

const FINAL = new Set([JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED]);

/**
 * The job now, at every change and at least every few seconds, until its state is final.
 *
 * Rides out a server that is away for some 15 seconds. Throws gRPC's `ServiceError`.
 */
export async function* watch(
  client: Client,
  jobId: string,
  options: WatchOptions = {},
): AsyncGenerator<Job, void, undefined> {
  const { untilDelivered = false, signal } = options;
  const attempts = new Attempts();
  let revision = -1n;
  for (;;) {
    let problem: unknown = new Error(`the watch of job ${jobId} ended before the job did`);
    let ended = false;
    try {
      signal?.throwIfAborted();
      const stream = client.watchJob({ jobId, untilDelivered });
      for await (const { job } of messages(stream, signal)) {
        if (!job) continue;
        if (job.revision > revision) attempts.progress();
        revision = job.revision;
        ended = FINAL.has(job.state);
        yield job;
        if (ended && !untilDelivered) return;
      }
      if (ended) return;
    } catch (error) {
      if (!isCut(error)) throw error;
      problem = error;
    }
    await attempts.next(problem, signal);
  }
}
