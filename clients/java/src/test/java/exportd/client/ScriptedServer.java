package exportd.client;

import com.google.protobuf.ByteString;
import exportd.v1.DownloadMetadata;
import exportd.v1.ExportServiceGrpc;
import exportd.v1.GetJobRequest;
import exportd.v1.GetJobResponse;
import exportd.v1.Job;
import exportd.v1.JobState;
import exportd.v1.Manifest;
import exportd.v1.StreamDownloadRequest;
import exportd.v1.StreamDownloadResponse;
import exportd.v1.WatchJobRequest;
import exportd.v1.WatchJobResponse;
import io.grpc.Grpc;
import io.grpc.InsecureServerCredentials;
import io.grpc.Server;
import io.grpc.StatusRuntimeException;
import io.grpc.stub.StreamObserver;
import java.io.IOException;
import java.util.List;
import java.util.Queue;
import java.util.concurrent.ConcurrentLinkedQueue;
import java.util.concurrent.CopyOnWriteArrayList;
import java.util.zip.CRC32C;

/** A real server with one finished job, which breaks downloads off as told. */
final class ScriptedServer extends ExportServiceGrpc.ExportServiceImplBase
    implements AutoCloseable {
  /** A stream that ends with {@code error} after so many messages; null: with a damaged one. */
  record Break(int messages, StatusRuntimeException error) {}

  static final int CHUNK = 1000;

  final Queue<Break> breaks = new ConcurrentLinkedQueue<>();
  final List<Long> offsets = new CopyOnWriteArrayList<>();
  private final byte[] content;
  private final Server server;

  ScriptedServer(byte[] content) throws IOException {
    this.content = content;
    server =
        Grpc.newServerBuilderForPort(0, InsecureServerCredentials.create())
            .addService(this)
            .build()
            .start();
  }

  ExportdClient client() {
    return ExportdClient.builder("127.0.0.1:" + server.getPort()).plaintext().build();
  }

  @Override
  public void close() {
    server.shutdownNow();
  }

  @Override
  public void getJob(GetJobRequest request, StreamObserver<GetJobResponse> answer) {
    Manifest manifest =
        Manifest.newBuilder()
            .setJoinable(true)
            .setBytes(content.length)
            .setCrc32C(crc(ByteString.copyFrom(content)))
            .build();
    Job job =
        Job.newBuilder()
            .setJobId(request.getJobId())
            .setState(JobState.JOB_STATE_SUCCEEDED)
            .setManifest(manifest)
            .build();
    answer.onNext(GetJobResponse.newBuilder().setJob(job).build());
    answer.onCompleted();
  }

  /** Tells of a job that runs, and says no more. */
  @Override
  public void watchJob(WatchJobRequest request, StreamObserver<WatchJobResponse> answer) {
    Job job = Job.newBuilder().setState(JobState.JOB_STATE_RUNNING).build();
    answer.onNext(WatchJobResponse.newBuilder().setJob(job).build());
  }

  @Override
  public void streamDownload(
      StreamDownloadRequest request, StreamObserver<StreamDownloadResponse> answer) {
    offsets.add(request.getReadOffset());
    Break end = breaks.poll();
    DownloadMetadata metadata = DownloadMetadata.newBuilder().setTotalBytes(content.length).build();
    answer.onNext(StreamDownloadResponse.newBuilder().setMetadata(metadata).build());
    int sent = 0;
    for (int at = (int) request.getReadOffset(); at < content.length; at += CHUNK) {
      if (end != null && sent++ == end.messages()) {
        if (end.error() == null) {
          ByteString damaged = ByteString.copyFromUtf8("damaged");
          answer.onNext(StreamDownloadResponse.newBuilder().setOffset(at).setData(damaged).build());
          answer.onCompleted();
        } else {
          answer.onError(end.error());
        }
        return;
      }
      ByteString data = ByteString.copyFrom(content, at, Math.min(CHUNK, content.length - at));
      answer.onNext(
          StreamDownloadResponse.newBuilder()
              .setOffset(at)
              .setData(data)
              .setCrc32C(crc(data))
              .build());
    }
    answer.onCompleted();
  }

  private static int crc(ByteString data) {
    CRC32C crc = new CRC32C();
    crc.update(data.asReadOnlyByteBuffer());
    return (int) crc.getValue();
  }
}
