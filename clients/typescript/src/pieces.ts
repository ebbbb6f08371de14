import type { Manifest, Part } from "./gen/exportd/v1/job.js";
import type { Identity } from "./partial.js";

/** The bytes of one file at the server. */
export interface Source extends Identity {
  readonly bytes: number;
  readonly crc32c: number;
  readonly pieces: readonly Piece[];
}

/**
 * What a SHA-256 is known for: `bytes` of the file, after as many as `head` of the file's
 * first bytes, and before as many as `tail` of its last.
 *
 * The joined file carries the header and the trailer of its parts once; a part is rebuilt
 * with them. That they are the part's own is presumed: where it is wrong the SHA-256 fails
 * without any damage, and the CRC32C of the whole has to do.
 */
export interface Piece {
  readonly name: string;
  readonly bytes: number;
  /** Empty when it is not known. */
  readonly sha256: Uint8Array;
  readonly head: number;
  readonly tail: number;
}

/** One part as a source, with its index; or all of them joined. */
export function sourceOf(
  jobId: string,
  generation: bigint,
  manifest: Manifest,
  part?: Part,
): Source {
  const whole = part ?? manifest;
  const bytes = Number(whole.bytes);
  return {
    jobId,
    generation,
    part: part?.index,
    bytes,
    crc32c: whole.crc32c,
    pieces:
      part || manifest.parts.length < 2
        ? [unbroken(bytes, whole.sha256)]
        : piecesOf(bytes, manifest.parts),
  };
}

function piecesOf(total: number, parts: readonly Part[]): Piece[] {
  const first = parts[0];
  const last = parts.at(-1);
  const pieces = parts.map((part): Piece => {
    const head = part === first ? 0 : Number(part.prefixBytes);
    const tail = part === last ? 0 : Number(part.suffixBytes);
    // Other lengths mean other bytes: there is nothing to rebuild the part from.
    const known =
      (head === 0 || head === Number(first?.prefixBytes)) &&
      (tail === 0 || tail === Number(last?.suffixBytes));
    return {
      name: `part ${String(part.index)}`,
      bytes: Number(part.bytes) - head - tail,
      sha256: known ? part.sha256 : new Uint8Array(),
      head: known ? head : 0,
      tail: known ? tail : 0,
    };
  });
  const sum = pieces.reduce((bytes, piece) => bytes + piece.bytes, 0);
  const sound = sum === total && pieces.every((piece) => piece.bytes >= 0);
  return sound ? pieces : [unbroken(total, new Uint8Array())];
}

function unbroken(bytes: number, sha256: Uint8Array): Piece {
  return { name: "the file", bytes, sha256, head: 0, tail: 0 };
}
