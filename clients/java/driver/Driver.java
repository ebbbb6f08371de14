import com.google.gson.Gson;
import exportd.client.Download;
import exportd.client.DownloadOptions;
import exportd.client.Errors;
import exportd.client.ExportdClient;
import exportd.client.JobStream;
import exportd.v1.CreateExportRequest;
import exportd.v1.Format;
import exportd.v1.GetJobRequest;
import exportd.v1.Job;
import io.grpc.StatusRuntimeException;
import java.io.IOException;
import java.nio.file.Path;
import java.util.LinkedHashMap;
import java.util.List;
import java.util.Locale;
import java.util.Map;
import java.util.UUID;

/**
 * What the tests of all clients drive: {@code get JOB}, {@code watch JOB}, {@code download JOB PATH
 * [--part N] [--overwrite]}, {@code create DATASET FORMAT}. Prints one JSON object a line.
 */
final class Driver {
  private static final Gson GSON = new Gson();

  private Driver() {}

  public static void main(String[] arguments) {
    try (ExportdClient client = connect()) {
      run(client, List.of(arguments));
    } catch (IOException | RuntimeException error) {
      print(Map.of("error", told(error)));
      System.exit(1);
    }
  }

  private static ExportdClient connect() throws IOException {
    ExportdClient.Builder builder = ExportdClient.builder(System.getenv("EXPORTD_SERVER"));
    String ca = System.getenv("EXPORTD_CA_CERT");
    if (ca == null) {
      builder.plaintext();
    } else {
      builder.caFile(Path.of(ca));
    }
    String key = System.getenv("EXPORTD_TOKEN");
    if (key != null) {
      builder.token(key);
    }
    return builder.build();
  }

  private static void run(ExportdClient client, List<String> arguments) throws IOException {
    String id = arguments.get(1);
    switch (arguments.get(0)) {
      case "get" -> {
        GetJobRequest request = GetJobRequest.newBuilder().setJobId(id).build();
        printState(client.stub().getJob(request).getJob());
      }
      case "watch" -> {
        try (JobStream jobs = client.watch(id)) {
          jobs.forEach(Driver::printState);
        }
      }
      case "download" -> download(client, arguments);
      case "create" -> {
        CreateExportRequest request =
            CreateExportRequest.newBuilder()
                .setDataset(id)
                .setFormat(Format.valueOf(arguments.get(2)))
                .setRequestId(UUID.randomUUID().toString())
                .build();
        print(Map.of("job_id", client.stub().createExport(request).getJob().getJobId()));
      }
      default -> throw new IllegalArgumentException("no command " + arguments.get(0));
    }
  }

  private static void download(ExportdClient client, List<String> arguments) throws IOException {
    DownloadOptions options =
        DownloadOptions.DEFAULT.withOverwrite(arguments.contains("--overwrite"));
    int part = arguments.indexOf("--part");
    if (part >= 0) {
      options = options.withPart(Integer.parseInt(arguments.get(part + 1)));
    }
    long begun = System.nanoTime();
    Download done = client.download(arguments.get(1), Path.of(arguments.get(2)), options);
    double seconds = (System.nanoTime() - begun) / 1e9;
    Map<String, Object> answer = new LinkedHashMap<>();
    answer.put("path", done.path().toString());
    answer.put("bytes", done.bytes());
    answer.put("sha256", done.sha256());
    answer.put("verified_by", done.verifiedBy().name().toLowerCase(Locale.ROOT));
    answer.put("resumed", done.resumed());
    answer.put("seconds", seconds);
    print(answer);
  }

  private static Map<String, String> told(Exception error) {
    String code =
        error instanceof StatusRuntimeException failed ? failed.getStatus().getCode().name() : "";
    return Map.of(
        "code", code,
        "reason", Errors.reason(error),
        "message", String.valueOf(error.getMessage()),
        "type", error.getClass().getName());
  }

  private static void printState(Job job) {
    print(Map.of("state", job.getState().name()));
  }

  private static void print(Map<String, ?> line) {
    System.out.println(GSON.toJson(line));
    System.out.flush();
  }
}
