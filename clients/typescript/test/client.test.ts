import assert from "node:assert/strict";
import { spawnSync } from "node:child_process";
import { randomBytes } from "node:crypto";
import { rmSync, writeFileSync } from "node:fs";
import { mkdir, mkdtemp, readdir, readFile, rm, writeFile } from "node:fs/promises";
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

import { failure, join, jobOf, type Message, type PartOf, ScriptedServer } from "./server.js";

const HEADER = Buffer.from("id,name\n");

let server: ScriptedServer;
let client: Client;
let directory: string;
let path: string;

beforeEach(async () => {
  server = new ScriptedServer();
  await server.start();
  client = connect(server.address);
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

/** Milliseconds after which what should come at once never does. */
const STUCK_MS = 60_000;

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
    "dns:127.0.0.1:1",
    "ipv4:127.0.0.1:1",
    "ipv6:[::1]:1",
    "unix:/s",
  ])
    connect(address, { token }).close();
  for (const address of [
    "10.0.0.1:1",
    "localhost.example.com:1",
    "127.example.com:1",
    "[::2]:1",
    "::1:5005", // an address without a port
    "127.0.0.256:1", // a name
    "dns://192.0.2.1/localhost", // what that server says
    "dns:///unix:50051",
    "unix-abstract:s", // a name to this gRPC
  ]) {
    assert.throws(() => connect(address, { token }), /token: would be sent to/);
    connect(address, { token, tls: true }).close();
    connect(address, { token, allowPlaintextToken: true }).close();
  }
});

await test("a token that cannot be one is refused at once, and not told", () => {
  for (const token of ["", "secret\n", "two secrets", "s\u00e9cret"]) {
    assert.throws(
      () => connect("127.0.0.1:1", { token }),
      (error) => error instanceof TypeError && !error.message.includes("secret"),
    );
  }
});

await test("a call with one answer has a deadline, by the stub as well", async () => {
  server.silent = true;
  const hasty = connect(server.address, { timeout: 100 });
  const { jobId } = server.job;
  const late = { code: status.DEADLINE_EXCEEDED };
  await assert.rejects(hasty.getJob({ jobId }), late);
  await assert.rejects(new Promise((_, reject) => hasty.stub.getJob({ jobId }, reject)), late);
  await assert.rejects(download(hasty, jobId, path), late);
  hasty.close();
  const patient = client.getJob({ jobId }, { deadline: Date.now() + 100 });
  await assert.rejects(patient, late);
});

await test("nothing of a call that ended early holds the process", () => {
  const program = `
    import { connect } from "exportd";
    const client = connect(process.argv[1]); // nobody is there
    await client.getJob({ jobId: "?" }, { signal: AbortSignal.timeout(500) }).catch(() => {});
    try { connect("127.0.0.1:1", { token: "\\n" }).getJob({ jobId: "?" }); } catch {}
    console.log(process.getActiveResourcesInfo().filter((name) => name === "Timeout").length);`;
  const run = spawnSync(
    process.execPath,
    ["--input-type=module", "--eval", program, "127.0.0.1:1"],
    { encoding: "utf8", timeout: STUCK_MS },
  );
  assert.deepEqual([run.stderr, run.stdout], ["", "0\n"]);
});

await test("a signal ends what waits for an answer", { timeout: STUCK_MS }, async () => {
  server.silent = true;
  const { jobId } = server.job;
  const patient = connect(server.address, { timeout: 10 * STUCK_MS });
  for (const start of [
    (signal: AbortSignal) => patient.getJob({ jobId }, { signal }),
    (signal: AbortSignal) => download(patient, jobId, path, { signal }),
  ]) {
    const controller = new AbortController();
    const call = start(controller.signal);
    const wanted = assert.rejects(call, { name: "AbortError" });
    server.heard.once("getJob", () => {
      controller.abort();
    });
    await wanted;
    await assert.rejects(start(controller.signal), { name: "AbortError" });
  }
  assert.equal(server.seen.getJob.length, 2);
  patient.close();
});

await test("a watch waits as long as a quota asks for, and goes on", async () => {
  server.watches.push({
    jobs: [],
    error: failure(status.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED", 300),
  });
  const began = performance.now();
  for await (const { state } of watch(client, server.job.jobId)) {
    assert.equal(state, JobState.SUCCEEDED);
  }
  assert.ok(performance.now() - began >= 295);
  assert.equal(server.seen.watchJob.length, 2);
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

await test("a message that stays damaged is asked for three times", async () => {
  const id = holding(some());
  const damaged = Array.from({ length: 4 }, () => randomBytes(1000));
  server.meddle.push(
    ...damaged.map((data) => (message: Message) => {
      return message.offset === 1000n ? { ...message, data } : message;
    }),
  );
  await assert.rejects(download(client, id, path), VerificationError);
  assert.deepEqual(offsets(), [0, 1000, 1000]);
});

await test("a download waits as long as a quota asks for, and goes on", async () => {
  const id = holding(some());
  server.meddle.push((message) =>
    message.offset < 2000n
      ? message
      : { error: failure(status.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED", 300) },
  );
  const began = performance.now();
  await download(client, id, path);
  assert.ok(performance.now() - began >= 295);
  assert.deepEqual(offsets(), [0, 2000]);
});

for (const [code, why] of [
  [status.UNAUTHENTICATED, "UNAUTHENTICATED"],
  [status.PERMISSION_DENIED, "PERMISSION_DENIED"],
  [status.RESOURCE_EXHAUSTED, "QUOTA_EXCEEDED"],
  [status.INTERNAL, "INTERNAL"],
] as const) {
  await test(`after ${why} the next call goes on with what was fetched`, async () => {
    const id = holding(some());
    server.meddle.push((message) =>
      message.offset < 2000n ? message : { error: failure(code, why) },
    );
    await assert.rejects(download(client, id, path), { code });
    assert.deepEqual(await readdir(directory), [`.out.csv.${id}-1.part`]);
    await download(client, id, path);
    assert.deepEqual(offsets(), [0, 2000]);
    assert.deepEqual(await readFile(path), server.data);
    assert.deepEqual(await readdir(directory), ["out.csv"]);
  });
}

for (const [code, why] of [
  [status.NOT_FOUND, "OUTPUT_EXPIRED"],
  [status.FAILED_PRECONDITION, "PARTS_NOT_JOINABLE"],
] as const) {
  await test(`after ${why}, which lasts, nothing is left of a download`, async () => {
    const id = holding(some());
    server.meddle.push((message) =>
      message.offset < 2000n ? message : { error: failure(code, why) },
    );
    await assert.rejects(download(client, id, path), { code });
    assert.deepEqual(await readdir(directory), []);
  });
}

await test("what was fetched of a job that is gone is cleared away", async () => {
  const id = holding(some());
  await writeFile(joined(directory, `.out.csv.${id}-1.part`), randomBytes(3000));
  await writeFile(joined(directory, `.out.csv.${id}-1-0.part`), "of a part, another download");
  server.errors.getJob.push(failure(status.NOT_FOUND, "JOB_NOT_FOUND"));
  await assert.rejects(download(client, id, path), { code: status.NOT_FOUND });
  assert.deepEqual(await readdir(directory), [`.out.csv.${id}-1-0.part`]);
});

await test("in a directory a download takes the server's name, made safe", async () => {
  for (const [name, safe] of [
    ["a-b.csv", "a-b.csv"],
    ["../../etc/\u202e.\u0000rc\n", "rc"],
    ["C:\\Windows\\..", "export"],
    [`${"\u00e9".repeat(200)}.csv`, `${"\u00e9".repeat(88)}.csv`],
  ] as const) {
    const id = holding(some());
    assert.ok(server.job.manifest);
    server.job.manifest.fileName = name;
    const file = await download(client, id, directory);
    assert.equal(file.path, joined(directory, safe));
    assert.deepEqual(await readdir(directory), [safe]);
    await assert.rejects(download(client, id, `${directory}/`), { code: "EEXIST" });
    await rm(file.path);
  }
});

await test("a directory in the file's place is told before anything is fetched", async () => {
  const id = holding(some());
  assert.ok(server.job.manifest);
  server.job.manifest.fileName = "out.csv";
  await mkdir(path);
  const call = download(client, id, directory, { overwrite: true });
  await assert.rejects(call, { code: "EEXIST" });
  assert.deepEqual(offsets(), []);
});

await test("a file may have a long name", async () => {
  const id = holding(some());
  const name = `${"n".repeat(236)}.csv`;
  await download(client, id, joined(directory, name), { part: 0 });
  assert.deepEqual(await readdir(directory), [name]);
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

await test("a signal is heard while an earlier part of the file is read back", async () => {
  const id = holding(some());
  const partial = `.out.csv.${id}-1.part`;
  await writeFile(joined(directory, partial), server.data);
  const controller = new AbortController();
  const { signal } = controller;
  const getJob: Client["getJob"] = async (...call) => {
    const answer = await client.getJob(...call);
    controller.abort();
    return answer;
  };
  const aborting: Client = { ...client, getJob };
  await assert.rejects(download(aborting, id, path, { signal }), { name: "AbortError" });
  assert.deepEqual(await readdir(directory), [partial]);
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
