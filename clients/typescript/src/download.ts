import { resolve } from "node:path";

import { crc32c } from "@node-rs/crc32";

import { Attempts } from "./attempts.js";
import type { Client } from "./calls.js";
import { isCut, reason, VerificationError } from "./errors.js";
import type { StreamDownloadResponse } from "./gen/exportd/v1/export_service.js";
import { codeOf, PartialFile, refuseExisting } from "./partial.js";
import { type Source, sourceOf } from "./pieces.js";
import { messages } from "./streams.js";
import { type VerifiedBy, Verifier } from "./verifier.js";

const RESTARTS = 3;

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
 * verified.
 *
 * Goes on by itself where a stream broke off, and where an earlier call left a partial file.
 * Throws gRPC's `ServiceError`; `VerificationError` when bytes do not match their checksums;
 * Node's own errors for files, `EEXIST` among them.
 */
export async function download(
  client: Client,
  jobId: string,
  path: string,
  options: DownloadOptions = {},
): Promise<Download> {
  const target = resolve(path);
  if (!options.overwrite) await refuseExisting(target);
  for (let restarts = 0; ; restarts += 1) {
    options.signal?.throwIfAborted();
    const { job } = await client.getJob({ jobId });
    const part = job?.manifest?.parts.find(({ index }) => index === options.part);
    if (!job?.manifest || (options.part !== undefined && !part)) {
      await refused(client, jobId, options);
      if (restarts < RESTARTS) continue; // it was finished in between
      throw new Error(`job ${jobId} has no manifest with that part, and yet sends it`);
    }
    const source = sourceOf(jobId, job.generation, job.manifest, part);
    try {
      return await fetchFile(client, source, target, options);
    } catch (error) {
      const again = error instanceof Outdated || reason(error) === "GENERATION_MISMATCH";
      if (!again || restarts >= RESTARTS) throw error;
    }
  }
}

/** A partial file that was there does not match what is to be downloaded. */
class Outdated extends VerificationError {}

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
  const part = source.part === undefined ? "" : `-${String(source.part)}`;
  const file = await PartialFile.open(target, `${source.jobId}${part}`, source.generation);
  try {
    const verifier = new Verifier(source, file);
    const there = await file.size();
    if (there > source.bytes) throw new Outdated(`${file.path} is longer than the output`);
    for await (const block of file.blocks(0, there)) verifier.update(block);
    await transfer(client, source, file, verifier, there, options);
    const verifiedBy = await verifier.finish().catch((error: unknown) => {
      if (there > 0 && error instanceof VerificationError) throw new Outdated(error.message);
      throw error;
    });
    await file.publish(options.overwrite ?? false);
    return { path: target, bytes: source.bytes, sha256: sha256(source), verifiedBy };
  } catch (error) {
    const aborted = options.signal?.aborted ?? false;
    if (aborted || isCut(error) || codeOf(error) === "EEXIST") await file.close();
    else await file.discard(); // nothing will ever complete these bytes, or the disk is full
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
  while (position < source.bytes) {
    let problem: unknown = new VerificationError("the stream ended before the file did");
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
        attempts.progress();
        options.onProgress?.(position, source.bytes);
      }
      if (position === source.bytes) return;
    } catch (error) {
      if (!(isCut(error) || error instanceof Corrupt)) throw error;
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
