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

/** Milliseconds after which a stream was a good one. */
const LASTED_MS = 10_000;

const FINAL = new Set([JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED]);

/**
 * The job now, at every change and at least every few seconds, until its state is final.
 *
 * Rides out a server that is away for some 15 seconds. Throws gRPC's `ServiceError`.
 *
 * Failures in a row are those between which there was no news of the job and no stream that
 * lasted. That every new stream begins with the job as it stands does not count: against a
 * server that breaks each one off, a watch would go on for ever.
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
    let began = Infinity; // with its first message: before that it may just be dialling
    try {
      signal?.throwIfAborted();
      const stream = client.watchJob({ jobId, untilDelivered });
      for await (const { job } of messages(stream, signal)) {
        if (!job) continue;
        began = Math.min(began, performance.now());
        if (job.revision !== revision) attempts.progress();
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
    if (performance.now() - began >= LASTED_MS) attempts.progress();
    await attempts.next(problem, signal);
  }
}
