import { mkdir, stat } from "node:fs/promises";
import { resolve, sep } from "node:path";

const LONGEST_NAME = 180; // bytes; leaves room for what comes around it within 255

/** The directory that `path` is, in full. One that ends with a separator is made. */
export async function directoryAt(path: string): Promise<string | undefined> {
  if (path === "") throw new TypeError("path is empty; give a file or a directory");
  const directory = resolve(path);
  if (path.endsWith("/") || path.endsWith(sep)) await mkdir(directory, { recursive: true });
  // Why it cannot be looked at is told where it is opened.
  const found = await stat(directory).catch(() => undefined);
  return found?.isDirectory() ? directory : undefined;
}

/**
 * A file name that stays in its directory, whatever the server said. Only the last component
 * counts; control and format characters, which can hide or turn text around, and leading dots
 * go; the length is bounded.
 */
export function safeName(name: string, fallback: string): string {
  const last = name.slice(Math.max(name.lastIndexOf("/"), name.lastIndexOf("\\")) + 1);
  const safe = last
    .replace(/[\p{Cc}\p{Cf}\p{Cs}]/gu, "")
    .trim()
    .replace(/^\.+/, "");
  const bytes = Buffer.from(safe);
  if (bytes.length <= LONGEST_NAME) return safe || fallback;
  const end = bytes.subarray(-LONGEST_NAME); // it carries the extension
  const whole = end.findIndex((byte) => (byte & 0xc0) !== 0x80); // where a character begins
  return end.subarray(whole).toString();
}
