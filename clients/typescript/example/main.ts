/**
 * Creates an export, watches it, downloads it, verifies it. EXPORTD_SERVER, EXPORTD_TOKEN and
 * EXPORTD_CA_CERT say where to and how; without them it is a local server in plaintext.
 */

import { connect, download, Format, JobState, watch } from "exportd";

const {
  EXPORTD_SERVER: address = "localhost:50051",
  EXPORTD_TOKEN: token,
  EXPORTD_CA_CERT: ca,
} = process.env;

const client = connect(address, {
  ...(token !== undefined && { token }),
  ...(ca && { tls: { ca } }),
});
try {
  const { job } = await client.createExport({
    requestId: crypto.randomUUID(), // makes it safe to send again
    dataset: "positions",
    format: Format.CSV,
  });
  if (!job) throw new Error("the server sent no job");

  for await (const seen of watch(client, job.jobId)) {
    console.log(JobState[seen.state], seen.progress?.rows.toString(), "rows");
    if (seen.error) throw new Error(seen.error.message);
  }

  const file = await download(client, job.jobId, "positions.csv", {
    overwrite: true,
    onProgress: (done, total) => {
      console.log(`${String(done)} of ${String(total)} bytes`);
    },
  });
  console.log(`${file.path}: ${String(file.bytes)} bytes, verified by ${file.verifiedBy}`);
} finally {
  client.close();
}
