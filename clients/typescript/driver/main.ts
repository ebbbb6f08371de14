/**
 * Drives the client from tests: get, watch, download and create, one JSON object a line.
 * EXPORTD_SERVER, EXPORTD_TOKEN and EXPORTD_CA_CERT say where to and how.
 */

import { writeSync } from "node:fs";
import { parseArgs } from "node:util";

import { status } from "@grpc/grpc-js";
import {
  type Client,
  connect,
  download,
  Format,
  isServiceError,
  JobState,
  reason,
  VerificationError,
  watch,
} from "exportd";

const USAGE =
  "get JOB | watch JOB | download JOB PATH [--part N] [--overwrite] | create DATASET FORMAT";

/** Written at once, whatever comes after. */
function print(line: object): void {
  writeSync(1, `${JSON.stringify(line)}\n`);
}

function stateOf(state: JobState | undefined): string {
  return `JOB_STATE_${JobState[state ?? JobState.UNSPECIFIED]}`;
}

async function run(client: Client): Promise<void> {
  const { positionals, values } = parseArgs({
    allowPositionals: true,
    options: { part: { type: "string" }, overwrite: { type: "boolean", default: false } },
  });
  const [command, first = "", second = ""] = positionals;
  switch (command) {
    case "get": {
      const { job } = await client.getJob({ jobId: first });
      print({ state: stateOf(job?.state) });
      return;
    }
    case "watch":
      for await (const job of watch(client, first)) print({ state: stateOf(job.state) });
      return;
    case "download": {
      const began = performance.now();
      const file = await download(client, first, second, {
        overwrite: values.overwrite,
        ...(values.part !== undefined && { part: Number(values.part) }),
      });
      print({
        path: file.path,
        bytes: file.bytes,
        sha256: file.sha256 ?? "",
        verified_by: file.verifiedBy,
        seconds: (performance.now() - began) / 1000,
      });
      return;
    }
    case "create": {
      const format =
        Format[second.toUpperCase().replace(/^FORMAT_/, "") as keyof typeof Format];
      const { job } = await client.createExport({ dataset: first, format });
      print({ job_id: job?.jobId });
      return;
    }
    default:
      throw new Error(`usage: ${USAGE}`);
  }
}

function describe(error: unknown): object {
  if (isServiceError(error)) {
    const { code, details: message } = error;
    return { code: status[code], reason: reason(error), message, type: "ServiceError" };
  }
  const { name, message } = error instanceof Error ? error : new Error(String(error));
  const code = error instanceof VerificationError ? status[error.code] : "";
  return { code, reason: "", message, type: name };
}

const {
  EXPORTD_SERVER: address = "localhost:50051",
  EXPORTD_TOKEN: token,
  EXPORTD_CA_CERT: ca,
} = process.env;
try {
  const client = connect(address, {
    ...(token !== undefined && { token }),
    ...(ca && { tls: { ca } }),
  });
  try {
    await run(client);
  } finally {
    client.close();
  }
} catch (error) {
  print({ error: describe(error) });
  process.exitCode = 1;
}
