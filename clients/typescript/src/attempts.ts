import { setTimeout as sleep } from "node:timers/promises";

import { retryAfter } from "./errors.js";

const LIMIT = 10;
const FIRST_DELAY_MS = 100;
const LONGEST_DELAY_MS = 5_000;

/** The attempts at one stream: rides out some 15 seconds without a server. */
export class Attempts {
  #failures = 0;

  /** Something new came: failures before it no longer count. */
  progress(): void {
    this.#failures = 0;
  }

  /**
   * Wait before the next attempt. Throws `error` when there were too many in a row that
   * brought nothing new, and the signal's reason when it is aborted.
   */
  async next(error: unknown, signal: AbortSignal | undefined): Promise<void> {
    this.#failures += 1;
    if (this.#failures >= LIMIT) throw error;
    // What the server asked for counts, as far as the longest wait goes.
    const wait = Math.max(
      delay(this.#failures),
      Math.min(LONGEST_DELAY_MS, retryAfter(error) ?? 0),
    );
    // Its own error for an aborted wait would hide the signal's reason.
    await sleep(wait, undefined, { ...(signal && { signal }) }).catch(() => undefined);
    signal?.throwIfAborted();
  }
}

/** Milliseconds; up to half is left to chance, so that clients do not march in step. */
export function delay(failures: number): number {
  const longest = Math.min(LONGEST_DELAY_MS, FIRST_DELAY_MS * 2 ** (failures - 1));
  return longest * (1 - Math.random() / 2);
}
