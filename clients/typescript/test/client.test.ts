import assert from "node:assert/strict";
import { randomBytes } from "node:crypto";
import { rmSync, writeFileSync } from "node:fs";
import { mkdtemp, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join as joined } from "node:path";
import { afterEach, beforeEach, test } from "node:test";

import { status } from "@grpc/grpc-js";
import {
  type Client,
  connect,
  date,
  download,
  isServiceError,
  type Job,
  JobState,
  reason,
  timestamp,
  VerificationError,
  watch,
} from "exportd";

import { failure, join, jobOf, type PartOf, ScriptedServer } from "./server.js";

const HEADER = Buffer.from("id,name\n");

let server: ScriptedServer;
let client: Client;
let directory: string;
let path: string;

beforeEach(async () => {
  server = new ScriptedServer();
  client = connect(await server.start());
  directory = await mkdtemp(joined(tmpdir(), "exportd-"));
  path = joined(directory, "out.csv");
});

afterEach(async () => {
  client.close();
  server.stop();
  await rm(directory, { recursive: true });
});

/** Have the server hold a finished job of these parts; gives its id. */
function holding(...parts: PartOf[]): string {
  server.data = join(parts);
  server.job = jobOf(parts);
  return server.job.jobId;
}

const some = (bytes = 5500): PartOf => ({ data: randomBytes(bytes) });

const csv = (rows: number, header = HEADER): PartOf => ({
  data: Buffer.concat([header, randomBytes(rows)]),
  prefix: header.length,
});

const offsets = () => server.seen.streamDownload.map(({ readOffset }) => Number(readOffset));

await test("a read is repeated while the server is unavailable", async () => {
  server.errors.getJob.push(failure(status.UNAVAILABLE, "DRAINING"));
  const { job } = await client.getJob({ jobId: server.job.jobId });
  assert.equal(job?.jobId, server.job.jobId);
  assert.equal(server.seen.getJob.length, 2);
});

await test("a create, which may have been done, is not repeated", async () => {
  server.errors.createExport.push(failure(status.UNAVAILABLE, "DRAINING"));
  const call = client.createExport({ dataset: "positions" });
  await assert.rejects(call, { code: status.UNAVAILABLE });
  assert.equal(server.seen.createExport.length, 1);
});

await test("an error is gRPC's own, and its reason can be told", async () => {
  server.errors.getJob.push(failure(status.NOT_FOUND, "JOB_NOT_FOUND"));
  const error: unknown = await client.getJob({ jobId: "?" }).catch((e: unknown) => e);
  assert.ok(isServiceError(error));
  assert.equal(error.details, "[JOB_NOT_FOUND] so it is");
  assert.equal(reason(error), "JOB_NOT_FOUND");
  assert.equal(reason(new Error("of this machine")), "");
});

await test("a token goes in plaintext to this machine only, unless that is allowed", () => {
  const token = "secret";
  for (const address of [
    "127.0.0.1:1",
    "localhost:1",
    "[::1]:1",
    "dns:///localhost:1",
    "unix:/s",
  ])
    connect(address, { token }).close();
  for (const address of [
    "10.0.0.1:1",
    "localhost.example.com:1",
    "127.example.com:1",
    "[::2]:1",
  ]) {
    assert.throws(() => connect(address, { token }), /token: would be sent to/);
    connect(address, { token, tls: true }).close();
    connect(address, { token, allowPlaintextToken: true }).close();
  }
});

await test("a watch goes on after a cut, and ends with the job", async () => {
  const at = (state: JobState, revision: bigint): Job => ({ ...server.job, state, revision });
  const running = at(JobState.RUNNING, 1n);
  server.watches.push(
    { jobs: [running], error: failure(status.UNAVAILABLE) },
    { jobs: [running] },
    { jobs: [at(JobState.SUCCEEDED, 2n)] },
  );
  const states = [];
  for await (const { state } of watch(client, server.job.jobId)) states.push(state);
  assert.deepEqual(states, [JobState.RUNNING, JobState.RUNNING, JobState.SUCCEEDED]);
});

await test("a watch tells a lasting error at once", async () => {
  server.watches.push({ jobs: [], error: failure(status.NOT_FOUND, "JOB_NOT_FOUND") });
  await assert.rejects(watch(client, "?").next(), { code: status.NOT_FOUND });
  assert.equal(server.seen.watchJob.length, 1);
});

await test("a download arrives whole, and leaves nothing else behind", async () => {
  const id = holding(some());
  const file = await download(client, id, path);
  assert.deepEqual(await readFile(path), server.data);
  assert.equal(file.bytes, server.data.length);
  assert.equal(file.verifiedBy, "sha256");
  assert.deepEqual(await readdir(directory), ["out.csv"]);
});

await test("joined parts are verified by the SHA-256 of each", async () => {
  const id = holding(csv(2500), csv(10), csv(0), csv(3000));
  const file = await download(client, id, path);
  assert.deepEqual([file.verifiedBy, file.sha256], ["sha256", undefined]);
  assert.deepEqual(await readFile(path), server.data);
});

await test("where headers differ the CRC32C of the whole decides", async () => {
  const id = holding(csv(2500), csv(2500, Buffer.from("ID,NAME\n")));
  assert.equal((await download(client, id, path)).verifiedBy, "crc32c");
  const { manifest } = server.job;
  assert.ok(manifest);
  manifest.crc32c = (manifest.crc32c ^ 1) >>> 0;
  await assert.rejects(download(client, id, path, { overwrite: true }), VerificationError);
});

await test("a stream that breaks off is gone on with at the last byte", async () => {
  const id = holding(some());
  server.meddle.push((message) =>
    message.offset < 2000n ? message : { error: failure(status.INTERNAL) },
  );
  await download(client, id, path);
  assert.deepEqual(offsets(), [0, 2000]);
  assert.deepEqual(await readFile(path), server.data);
});

await test("a damaged message is asked for again", async () => {
  const id = holding(some());
  server.meddle.push((message) =>
    message.offset === 1000n ? { ...message, data: randomBytes(1000) } : message,
  );
  await download(client, id, path);
  assert.deepEqual(offsets(), [0, 1000]);
  assert.deepEqual(await readFile(path), server.data);
});

await test("an answer of the service's ends a download at once, without a trace", async () => {
  const id = holding(some());
  server.meddle.push((message) =>
    message.offset < 2000n ? message : { error: failure(status.INTERNAL, "INTERNAL") },
  );
  await assert.rejects(download(client, id, path), { code: status.INTERNAL });
  assert.deepEqual(await readdir(directory), []);
});

await test("output that was made anew is downloaded from its start", async () => {
  const id = holding(some());
  server.meddle.push((message) => {
    if (message.offset < 2000n) return message;
    const fresh = some();
    server.data = fresh.data;
    server.job = jobOf([fresh], 2n);
    return { error: failure(status.FAILED_PRECONDITION, "GENERATION_MISMATCH") };
  });
  await download(client, id, path);
  assert.deepEqual(
    server.seen.streamDownload.map(({ ifGenerationMatch }) => ifGenerationMatch),
    [1n, 2n],
  );
  assert.deepEqual(await readFile(path), server.data);
});

await test("an aborted download is gone on with by the next call", async () => {
  const id = holding(some());
  const controller = new AbortController();
  const { signal } = controller;
  const onProgress = (done: number) => {
    if (done === 3000) controller.abort();
  };
  await assert.rejects(download(client, id, path, { signal, onProgress }), {
    name: "AbortError",
  });
  assert.equal((await readdir(directory)).includes("out.csv"), false);
  await download(client, id, path);
  assert.deepEqual(offsets(), [0, 3000]);
  assert.deepEqual(await readFile(path), server.data);
});

await test("a partial file with other bytes in it does no harm", async () => {
  const id = holding(some());
  await writeFile(joined(directory, `.out.csv.${id}-1.part`), randomBytes(3000));
  await download(client, id, path);
  assert.deepEqual(offsets(), [3000, 0]);
  assert.deepEqual(await readFile(path), server.data);
  assert.deepEqual(await readdir(directory), ["out.csv"]);
});

await test("the partial file of an older generation is cleared away", async () => {
  const id = holding(some());
  await writeFile(joined(directory, `.out.csv.${id}-0.part`), randomBytes(3000));
  await download(client, id, path);
  assert.deepEqual(await readdir(directory), ["out.csv"]);
});

await test("bytes that match their message but not the manifest are refused", async () => {
  const id = holding(some());
  server.data = randomBytes(server.data.length);
  await assert.rejects(download(client, id, path), VerificationError);
  assert.deepEqual(await readdir(directory), []);
});

await test("a file that is there is replaced only when that is wanted", async () => {
  const id = holding(some());
  await writeFile(path, "precious");
  await assert.rejects(download(client, id, path), { code: "EEXIST" });
  assert.deepEqual(offsets(), []);
  assert.equal(await readFile(path, "utf8"), "precious");
  await download(client, id, path, { overwrite: true });
  assert.deepEqual(await readFile(path), server.data);
});

await test("a file that appears meanwhile is not replaced either", async () => {
  const id = holding(some());
  const written: Promise<void>[] = [];
  const onProgress = (done: number) => {
    if (done === 1000) written.push(writeFile(path, "precious"));
  };
  await assert.rejects(download(client, id, path, { onProgress }), { code: "EEXIST" });
  await Promise.all(written);
  assert.equal(await readFile(path, "utf8"), "precious");
});

await test("of two downloads to one path one arrives, whole", async () => {
  const id = holding(some());
  const both = [download(client, id, path), download(client, id, path)];
  const outcomes = (await Promise.allSettled(both)).map(({ status }) => status);
  assert.deepEqual(outcomes.sort(), ["fulfilled", "rejected"]);
  assert.deepEqual(await readFile(path), server.data);
  assert.deepEqual(await readdir(directory), ["out.csv"]);
});

await test("a file that took the place of the partial one is not published", async () => {
  const id = holding(some());
  const partial = joined(directory, `.out.csv.${id}-1.part`);
  const onProgress = (done: number) => {
    if (done !== 1000) return;
    rmSync(partial);
    writeFileSync(partial, "other");
  };
  await assert.rejects(download(client, id, path, { onProgress }), /took over/);
  assert.equal((await readdir(directory)).includes("out.csv"), false);
});

await test("why there is nothing to download is for the server to say", async () => {
  server.job = { ...server.job, state: JobState.RUNNING, manifest: undefined };
  server.meddle.push(() => ({
    error: failure(status.FAILED_PRECONDITION, "JOB_NOT_FINISHED"),
  }));
  const error: unknown = await download(client, "?", path).catch((e: unknown) => e);
  assert.equal(reason(error), "JOB_NOT_FINISHED");
});

await test("moments survive, before 1970 as well", () => {
  for (const text of ["2026-01-31T12:00:00.250Z", "1969-12-31T23:59:59.750Z"]) {
    assert.equal(date(timestamp(new Date(text))).toISOString(), text);
  }
  assert.equal(timestamp(new Date(-250)).nanos, 750_000_000);
});
