import { createHash } from "node:crypto";
import { constants } from "node:fs";
import { type FileHandle, link, lstat, open, readdir, rename, unlink } from "node:fs/promises";
import { basename, dirname, join } from "node:path";

const BLOCK = 4 * 1024 * 1024;
const LONGEST_NAME = 150; // bytes; leaves room for the rest of the partial's name within 255
const NO_LINKS = new Set(["EPERM", "ENOTSUP", "EOPNOTSUPP", "ENOSYS"]);

/** What a partial file is of: bytes that never change. */
export interface Identity {
  readonly jobId: string;
  readonly generation: bigint;
  /** Index of the part; undefined: all parts joined. */
  readonly part: number | undefined;
}

/**
 * The bytes of a download before they have their final name:
 * `.<name>.<job>-<generation>[-<part>].part` beside it.
 *
 * The bytes of a generation never change. So what an earlier
 * process left can be gone on with, and two processes that share the file write the same
 * bytes to the same places. For that a partial file is never truncated: what is wrong is
 * unlinked, and whoever else had it open finds it gone when it wants to publish it.
 */
export class PartialFile {
  private constructor(
    readonly path: string,
    private readonly target: string,
    private readonly handle: FileHandle,
  ) {}

  /** Open what is there, or a new file. Those of older generations go. */
  static async open(target: string, identity: Identity): Promise<PartialFile> {
    const { generation } = identity;
    await PartialFile.clear(target, identity, (other) => other < generation);
    const { prefix, suffix } = around(target, identity);
    const path = join(dirname(target), `${prefix}${String(generation)}${suffix}`);
    // Not through a link that somebody laid there. Windows lacks that flag: it counts as 0.
    const flags = constants.O_RDWR | constants.O_CREAT | constants.O_NOFOLLOW;
    return new PartialFile(path, target, await open(path, flags, 0o666));
  }

  /** Delete those of the same job, part and target whose generation is `outdated`. */
  static async clear(
    target: string,
    identity: Omit<Identity, "generation">,
    outdated: (generation: bigint) => boolean = () => true,
  ): Promise<void> {
    const directory = dirname(target);
    const { prefix, suffix } = around(target, identity);
    for (const name of await readdir(directory)) {
      if (!name.startsWith(prefix) || !name.endsWith(suffix)) continue;
      const generation = name.slice(prefix.length, -suffix.length);
      if (/^\d+$/.test(generation) && outdated(BigInt(generation))) {
        await unlink(join(directory, name)).catch(ignoreAbsence);
      }
    }
  }

  /** Bytes in the file. */
  async size(): Promise<number> {
    return (await this.handle.stat()).size;
  }

  /** Write all of `data` at `position`. */
  async write(data: Uint8Array, position: number): Promise<void> {
    for (let done = 0; done < data.length;) {
      const { bytesWritten } = await this.handle.write(
        data,
        done,
        data.length - done,
        position + done,
      );
      done += bytesWritten;
    }
  }

  /** The bytes from `start` to `end`. Throws when the file ends before. */
  async *blocks(start: number, end: number): AsyncGenerator<Buffer, void, undefined> {
    for (let position = start; position < end;) {
      const block = Buffer.allocUnsafe(Math.min(BLOCK, end - position));
      const { bytesRead } = await this.handle.read(block, 0, block.length, position);
      if (bytesRead === 0) throw new Error(`${this.path} has become shorter; download again`);
      yield block.subarray(0, bytesRead);
      position += bytesRead;
    }
  }

  /** Close it, and leave it for the next call to go on with. */
  async close(): Promise<void> {
    await this.handle.close();
  }

  /** Close and delete it. */
  async discard(): Promise<void> {
    const ours = await this.isThere();
    await this.handle.close();
    if (ours) await unlink(this.path).catch(ignoreAbsence);
  }

  /** Give it the final name, durably, and close it. */
  async publish(overwrite: boolean): Promise<void> {
    await this.handle.sync();
    if (!(await this.isThere())) {
      throw new Error(`another download to ${this.target} took over; give it another path`);
    }
    if (overwrite) await rename(this.path, this.target);
    else await this.rename();
    await syncDirectory(dirname(this.target));
    await this.handle.close();
  }

  /** Whether the file still has its name. */
  private async isThere(): Promise<boolean> {
    const ours = await this.handle.stat({ bigint: true });
    const named = await lstat(this.path, { bigint: true }).catch(ignoreAbsence);
    return named?.ino === ours.ino && named.dev === ours.dev;
  }

  /** Rename without replacing: a hard link fails when the name is taken. */
  private async rename(): Promise<void> {
    try {
      await link(this.path, this.target);
    } catch (error) {
      if (!NO_LINKS.has(codeOf(error))) throw error;
      await refuseExisting(this.target, false);
      await rename(this.path, this.target);
      return;
    }
    await unlink(this.path);
  }
}

/**
 * Throw `EEXIST` when the name is taken, be it by a dangling link. With `overwrite` only a
 * directory is in the way.
 */
export async function refuseExisting(path: string, overwrite: boolean): Promise<void> {
  const taken = await lstat(path).catch(ignoreAbsence);
  if (!taken || (overwrite && !taken.isDirectory())) return;
  const mend = taken.isDirectory()
    ? "is a directory; give another path"
    : "exists; give another path, or set overwrite";
  throw Object.assign(new Error(`EEXIST: ${path} ${mend}`), { code: "EEXIST", path });
}

/** What stands before and after the generation in the name of a partial file. */
function around(
  target: string,
  { jobId, part }: Omit<Identity, "generation">,
): { readonly prefix: string; readonly suffix: string } {
  const name = basename(target);
  const short =
    Buffer.byteLength(name) <= LONGEST_NAME
      ? name
      : createHash("sha256").update(name).digest("hex");
  return {
    prefix: `.${short}.${jobId.replace(/[^\w-]/g, "_")}-`,
    suffix: `${part === undefined ? "" : `-${String(part)}`}.part`,
  };
}

async function syncDirectory(directory: string): Promise<void> {
  if (process.platform === "win32") return; // it cannot open directories
  const handle = await open(directory, constants.O_RDONLY);
  try {
    await handle.sync();
  } finally {
    await handle.close();
  }
}

function ignoreAbsence(error: unknown): undefined {
  if (codeOf(error) !== "ENOENT") throw error;
}

/** What Node calls an error of the system, such as `ENOSPC`; empty for other errors. */
function codeOf(error: unknown): string {
  return error instanceof Error && "code" in error ? String(error.code) : "";
}
