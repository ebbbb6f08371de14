import { join, resolve } from "node:path";

import { crc32c } from "@node-rs/crc32";

import { Attempts } from "./attempts.js";
import type { Client } from "./calls.js";
import { isCut, reason, Spoiled, VerificationError } from "./errors.js";
import type { StreamDownloadResponse } from "./gen/exportd/v1/export_service.js";
import { directoryAt, safeName } from "./names.js";
import { PartialFile, refuseExisting } from "./partial.js";
import { type Source, sourceOf } from "./pieces.js";
import { messages } from "./streams.js";
import { type VerifiedBy, Verifier } from "./verifier.js";

const RESTARTS = 3;
const CORRUPT_LIMIT = 3; // bad messages at one place before it counts as lost

/** Reasons why bytes that are there can never be completed. */
const HOPELESS = new Set([
  "JOB_NOT_FOUND",
  "PART_NOT_FOUND",
  "OUTPUT_EXPIRED",
  "OUTPUT_DROPPED",
  "JOB_FAILED",
  "JOB_CANCELLED",
  "GENERATION_MISMATCH",
  "PARTS_NOT_JOINABLE",
]);

/** What to download, and how. */
export interface DownloadOptions {
  /** Index of the only part to download, from 0; otherwise all parts joined into one file. */
  readonly part?: number;
  /** Replace a file that is there. */
  readonly overwrite?: boolean;
  /** Told how many bytes are there, and how many there will be. */
  readonly onProgress?: (done: number, total: number) => void;
  /** Ends it early, with the signal's reason; the same call again goes on. */
  readonly signal?: AbortSignal;
}

/** A file that is there, whole. */
export interface Download {
  readonly path: string;
  readonly bytes: number;
  /** In hex; undefined for several joined parts, which have no SHA-256 together. */
  readonly sha256: string | undefined;
  /**
   * `sha256` when it vouches for every byte. `crc32c` when the header of a part could not be
   * told from the joined file, so that the CRC32C of the whole had to do.
   */
  readonly verifiedBy: VerifiedBy;
}

/**
 * Download the output of a job to the file `path`, which appears once everything was
 * verified. In a directory it takes the server's name for it.
 *
 * Goes on by itself where a stream broke off, and where an earlier call left a partial file:
 * that stays after a failure unless nothing will ever complete it.
 * Throws gRPC's `ServiceError`; `VerificationError` when bytes do not match their checksums;
 * Node's own errors for files, `EEXIST` among them.
 */
export async function download(
  client: Client,
  jobId: string,
  path: string,
  options: DownloadOptions = {},
): Promise<Download> {
  const { part, overwrite = false } = options;
  const directory = await directoryAt(path);
  const file = directory ? undefined : resolve(path);
  if (file) await refuseExisting(file, overwrite);
  for (let restarts = 0; ; restarts += 1) {
    const output = await outputOf(client, jobId, options).catch(async (error: unknown) => {
      const hopeless = file && isHopeless(error);
      // What cannot be cleared away must not hide the error.
      if (hopeless) await PartialFile.clear(file, { jobId, part }).catch(() => undefined);
      throw error;
    });
    if (!output) {
      if (restarts < RESTARTS) continue; // it was finished in between
      throw new Error(`job ${jobId} has no manifest with that part, and yet sends it`);
    }
    const target = file ?? join(directory ?? "", safeName(output.fileName, "export"));
    if (!file) await refuseExisting(target, overwrite);
    try {
      return await fetchFile(client, output.source, target, options);
    } catch (error) {
      const again = error instanceof Outdated || reason(error) === "GENERATION_MISMATCH";
      if (!again || restarts >= RESTARTS) throw error;
    }
  }
}

/** What there is to download; undefined when there was nothing, and now there is. */
async function outputOf(
  client: Client,
  jobId: string,
  options: DownloadOptions,
): Promise<{ readonly source: Source; readonly fileName: string } | undefined> {
  const { job } = await client.getJob({ jobId }, { signal: options.signal });
  const part = job?.manifest?.parts.find(({ index }) => index === options.part);
  if (!job?.manifest || (options.part !== undefined && !part)) {
    await refused(client, jobId, options);
    return undefined;
  }
  const { fileName } = part ?? job.manifest;
  return { source: sourceOf(jobId, job.generation, job.manifest, part), fileName };
}

function isHopeless(error: unknown): boolean {
  return error instanceof Spoiled || HOPELESS.has(reason(error));
}

/** A partial file that was there does not match what is to be downloaded. */
class Outdated extends Spoiled {}

/** Let the server say why there is nothing to download. */
async function refused(client: Client, jobId: string, options: DownloadOptions): Promise<void> {
  const stream = client.streamDownload({ jobId, partIndex: options.part, readLimit: 1 });
  for await (const message of messages(stream, options.signal)) {
    if (message.data.length > 0) return;
  }
}

async function fetchFile(
  client: Client,
  source: Source,
  target: string,
  options: DownloadOptions,
): Promise<Download> {
  const file = await PartialFile.open(target, source);
  try {
    const verifier = new Verifier(source, file);
    const there = await file.size();
    if (there > source.bytes) throw new Outdated(`${file.path} is longer than the output`);
    for await (const block of file.blocks(0, there)) {
      options.signal?.throwIfAborted();
      verifier.update(block);
    }
    await transfer(client, source, file, verifier, there, options);
    const verifiedBy = await verifier.finish().catch((error: unknown) => {
      if (there > 0 && error instanceof Spoiled) throw new Outdated(error.message);
      throw error;
    });
    await file.publish(options.overwrite ?? false);
    return { path: target, bytes: source.bytes, sha256: sha256(source), verifiedBy };
  } catch (error) {
    if (isHopeless(error)) await file.discard();
    else await file.close(); // the same call again goes on with it
    throw error;
  }
}

/** Fetch the bytes from `position` on, on as many streams as it takes. */
async function transfer(
  client: Client,
  source: Source,
  file: PartialFile,
  verifier: Verifier,
  position: number,
  options: DownloadOptions,
): Promise<void> {
  const attempts = new Attempts();
  let corrupt = 0; // messages in a row at this position
  while (position < source.bytes) {
    let problem: unknown = new Error("the stream ended before the file did");
    try {
      const stream = client.streamDownload({
        jobId: source.jobId,
        partIndex: source.part,
        readOffset: position,
        ifGenerationMatch: source.generation,
      });
      for await (const message of messages(stream, options.signal)) {
        if (message.data.length === 0) continue; // metadata
        check(message, position, source.bytes);
        // The disk works while this thread hashes.
        const written = file.write(message.data, position);
        verifier.update(message.data);
        await written;
        position += message.data.length;
        corrupt = 0;
        attempts.progress();
        options.onProgress?.(position, source.bytes);
      }
      if (position === source.bytes) return;
    } catch (error) {
      if (error instanceof Corrupt) corrupt += 1;
      else if (!isCut(error)) throw error;
      if (corrupt >= CORRUPT_LIMIT) throw error;
      problem = error;
    }
    await attempts.next(problem, options.signal);
  }
}

/** A message is not what it should be. */
class Corrupt extends VerificationError {}

function check(message: StreamDownloadResponse, position: number, total: number): void {
  const { offset, data } = message;
  if (Number(offset) !== position) {
    throw new Corrupt(`bytes of offset ${String(offset)} came, not of ${String(position)}`);
  }
  if (position + data.length > total) throw new Corrupt("more bytes came than the file has");
  if (crc32c(data) !== message.crc32c) {
    throw new Corrupt(`the bytes at ${String(position)} do not match their checksum`);
  }
}

function sha256(source: Source): string | undefined {
  const [piece, ...others] = source.pieces;
  if (!piece || others.length > 0 || piece.sha256.length === 0) return undefined;
  return Buffer.from(piece.sha256).toString("hex");
}
