import { createHash, type Hash } from "node:crypto";

import { crc32c } from "@node-rs/crc32";

import { Spoiled } from "./errors.js";
import type { PartialFile } from "./partial.js";
import type { Piece, Source } from "./pieces.js";

/** Which checksum vouches for every byte. */
export type VerifiedBy = "sha256" | "crc32c";

/** Holds the bytes of a file, which come in order, against the checksums of its source. */
export class Verifier {
  readonly #source: Source;
  readonly #file: PartialFile;
  readonly #begun: { readonly piece: Piece; readonly hash: Hash }[] = [];
  readonly #longestHead: number;
  #start = Buffer.alloc(0); // of the file, as far as heads need it
  #crc = 0;
  #left = 0; // bytes to come of the last piece that was begun

  constructor(source: Source, file: PartialFile) {
    this.#source = source;
    this.#file = file;
    this.#longestHead = Math.max(...source.pieces.map(({ head }) => head));
  }

  /** Take the next bytes. They need not be in the file yet. */
  update(data: Uint8Array): void {
    const missing = this.#longestHead - this.#start.length;
    if (missing > 0) this.#start = Buffer.concat([this.#start, data.subarray(0, missing)]);
    this.#crc = crc32c(data, this.#crc);
    let rest = data;
    while (rest.length > 0) {
      while (this.#left === 0) this.#begin();
      const ours = rest.subarray(0, this.#left);
      this.#begun.at(-1)?.hash.update(ours);
      this.#left -= ours.length;
      rest = rest.subarray(ours.length);
    }
  }

  /** Compare, once every byte was given and is in the file. Throws `Spoiled`. */
  async finish(): Promise<VerifiedBy> {
    const { pieces, bytes, crc32c: expected } = this.#source;
    while (this.#begun.length < pieces.length) this.#begin();
    let proven = true;
    for (const { piece, hash } of this.#begun) {
      for await (const block of this.#file.blocks(bytes - piece.tail, bytes)) {
        hash.update(block);
      }
      proven = holds(piece, hash.digest()) && proven;
    }
    if (this.#crc !== expected) {
      throw new Spoiled("the file does not match its CRC32C");
    }
    return proven ? "sha256" : "crc32c";
  }

  #begin(): void {
    const piece = this.#source.pieces[this.#begun.length];
    if (!piece) throw new Spoiled("more bytes came than the file has");
    const hash = createHash("sha256").update(this.#start.subarray(0, piece.head));
    this.#begun.push({ piece, hash });
    this.#left = piece.bytes;
  }
}

function holds(piece: Piece, digest: Buffer): boolean {
  if (piece.sha256.length > 0 && digest.equals(piece.sha256)) return true;
  if (piece.sha256.length > 0 && piece.head === 0 && piece.tail === 0) {
    throw new Spoiled(`${piece.name} does not match its SHA-256`);
  }
  return false;
}
