import { createHash } from "node:crypto";
import { constants } from "node:fs";
import { type FileHandle, link, lstat, open, readdir, rename, unlink } from "node:fs/promises";
import { basename, dirname, join } from "node:path";

const BLOCK = 4 * 1024 * 1024;
const LONGEST_NAME = 150; // bytes; leaves room for the rest of the partial's name within 255
const NO_LINKS = new Set(["EPERM", "ENOTSUP", "EOPNOTSUPP", "ENOSYS"]);

/**
 * The bytes of a download before they have their final name: `.<name>.<key>.part` beside it.
 *
 * The key names job, part and generation, whose bytes never change. So what an earlier
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

  /** Open what is there, or a new file; `generation` is the end of its key. */
  static async open(target: string, key: string, generation: bigint): Promise<PartialFile> {
    const name = basename(target);
    const short =
      Buffer.byteLength(name) <= LONGEST_NAME
        ? name
        : createHash("sha256").update(name).digest("hex");
    const directory = dirname(target);
    const prefix = `.${short}.${key.replace(/[^\w-]/g, "_")}-`;
    const current = `${prefix}${String(generation)}.part`;
    for (const other of await readdir(directory)) {
      const outdated = other.startsWith(prefix) && other !== current;
      if (outdated && /^\d+\.part$/.test(other.slice(prefix.length))) {
        await unlink(join(directory, other)).catch(ignoreAbsence);
      }
    }
    const path = join(directory, current);
    // Not through a link that somebody laid there. Windows lacks that flag: it counts as 0.
    const flags = constants.O_RDWR | constants.O_CREAT | constants.O_NOFOLLOW;
    return new PartialFile(path, target, await open(path, flags, 0o666));
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
      await refuseExisting(this.target);
      await rename(this.path, this.target);
      return;
    }
    await unlink(this.path);
  }
}

/** Throw `EEXIST` when the name is taken, be it by a dangling link. */
export async function refuseExisting(path: string): Promise<void> {
  const taken = await lstat(path).catch(ignoreAbsence);
  if (!taken) return;
  throw Object.assign(
    new Error(`EEXIST: ${path} exists; give another path, or set overwrite`),
    { code: "EEXIST", path },
  );
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
export function codeOf(error: unknown): string {
  return error instanceof Error && "code" in error ? String(error.code) : "";
}
