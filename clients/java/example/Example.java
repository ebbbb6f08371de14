import exportd.client.Download;
import exportd.client.DownloadOptions;
import exportd.client.Errors;
import exportd.client.ExportdClient;
import exportd.v1.CreateExportRequest;
import exportd.v1.Format;
import exportd.v1.Job;
import exportd.v1.JobState;
import exportd.v1.Progress;
import io.grpc.StatusRuntimeException;
import java.io.IOException;
import java.nio.file.Path;
import java.util.UUID;

/**
 * Exports a dataset, follows the job, downloads the file and verifies it.
 *
 * <p>Arguments: {@code [DATASET [FILE]]}. From the environment: {@code EXPORTD_SERVER}
 * (localhost:50051), {@code EXPORTD_TOKEN}, and {@code EXPORTD_CA_CERT}, a PEM file.
 */
final class Example {
  private Example() {}

  public static void main(String[] arguments) throws IOException {
    String dataset = arguments.length > 0 ? arguments[0] : "positions";
    Path path = Path.of(arguments.length > 1 ? arguments[1] : dataset + ".csv");
    try (ExportdClient client = connect()) {
      Job job = export(client, dataset);
      Download done =
          client.download(
              job.getJobId(),
              path,
              DownloadOptions.DEFAULT
                  .withOverwrite(true)
                  .withProgress((bytes, total) -> System.out.println(bytes + " of " + total)));
      System.out.println(
          done.path() + ": " + done.bytes() + " bytes, verified by " + done.verifiedBy());
    } catch (StatusRuntimeException error) {
      System.err.println(error.getMessage() + " (reason: " + Errors.reason(error) + ")");
      System.exit(1);
    }
  }

  private static ExportdClient connect() throws IOException {
    ExportdClient.Builder builder =
        ExportdClient.builder(System.getenv().getOrDefault("EXPORTD_SERVER", "localhost:50051"));
    String roots = System.getenv("EXPORTD_CA_CERT");
    if (roots == null) {
      builder.plaintext();
    } else {
      builder.caFile(Path.of(roots));
    }
    String token = System.getenv("EXPORTD_TOKEN");
    return token == null ? builder.build() : builder.token(token).build();
  }

  private static Job export(ExportdClient client, String dataset) {
    CreateExportRequest request =
        CreateExportRequest.newBuilder()
            .setDataset(dataset)
            .setFormat(Format.FORMAT_CSV)
            .setRequestId(UUID.randomUUID().toString()) // makes the call safe to repeat
            .build();
    Job job = client.stub().createExport(request).getJob();
    for (Job now : client.watch(job.getJobId())) {
      Progress progress = now.getProgress();
      System.out.println(now.getState() + ": " + progress.getRows() + " rows");
      job = now;
    }
    if (job.getState() != JobState.JOB_STATE_SUCCEEDED) {
      throw new IllegalStateException(job.getState() + ": " + job.getError().getMessage());
    }
    return job;
  }
}
