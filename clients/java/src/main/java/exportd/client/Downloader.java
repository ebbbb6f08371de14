package exportd.client;

import com.google.protobuf.ByteString;
import exportd.client.Verifier.DamageException;
import exportd.v1.DownloadMetadata;
import exportd.v1.ExportServiceGrpc;
import exportd.v1.ExportServiceGrpc.ExportServiceBlockingStub;
import exportd.v1.GetJobRequest;
import exportd.v1.Job;
import exportd.v1.StreamDownloadRequest;
import exportd.v1.StreamDownloadResponse;
import io.grpc.ManagedChannel;
import io.grpc.MethodDescriptor;
import io.grpc.Status;
import io.grpc.Status.Code;
import io.grpc.StatusRuntimeException;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.file.Files;
import java.nio.file.LinkOption;
import java.nio.file.Path;
import java.util.HexFormat;
import java.util.zip.CRC32C;

/** Downloads: resumed by themselves, verified, never half there under the final name. */
final class Downloader {
  private static final String GENERATION_MISMATCH = "GENERATION_MISMATCH";

  /** Generations to follow before giving up. */
  private static final int RESTARTS = 3;

  /** Bad messages in a row before the data counts as lost. */
  private static final int CORRUPT_ATTEMPTS = 3;

  private static final MethodDescriptor<StreamDownloadRequest, StreamDownloadResponse> METHOD =
      ExportServiceGrpc.getStreamDownloadMethod().toBuilder(
              ExportServiceGrpc.getStreamDownloadMethod().getRequestMarshaller(),
              new OneCopyMarshaller<>(
                  ExportServiceGrpc.getStreamDownloadMethod().getResponseMarshaller(),
                  StreamDownloadResponse.parser()))
          .build();

  private final ExportServiceBlockingStub stub;
  private final ManagedChannel channel;
  private ByteBuffer buffer = ByteBuffer.allocateDirect(2 * 1024 * 1024);

  Downloader(ExportServiceBlockingStub stub, ManagedChannel channel) {
    this.stub = stub;
    this.channel = channel;
  }

  Download download(String jobId, Path path, DownloadOptions options) throws IOException {
    for (int restarts = 0; ; restarts++) {
      Job job = stub.getJob(GetJobRequest.newBuilder().setJobId(jobId).build()).getJob();
      try {
        return fetch(Source.of(job, options.part()), path, options);
      } catch (StatusRuntimeException error) {
        if (!Errors.reason(error).equals(GENERATION_MISMATCH) || restarts == RESTARTS) {
          throw error;
        }
      }
    }
  }

  private Download fetch(Source source, Path path, DownloadOptions options) throws IOException {
    if (source.total() < 0) {
      throw refusal(source);
    }
    Path target =
        Files.isDirectory(path) ? path.resolve(FileNames.safe(source.fileName(), "export")) : path;
    if (!options.overwrite() && Files.exists(target, LinkOption.NOFOLLOW_LINKS)) {
      throw PartialFile.exists(target);
    }
    try (PartialFile file = PartialFile.open(target, key(source))) {
      try {
        return fill(source, target, file, options);
      } catch (StatusRuntimeException error) {
        if (!Errors.isCut(error)) {
          file.delete(); // nothing will ever complete these bytes
        }
        throw error;
      } catch (IOException error) {
        if (!Thread.currentThread().isInterrupted()) {
          file.delete();
        }
        throw error;
      }
    }
  }

  /** What the server says to a download of what the manifest does not offer. */
  private StatusRuntimeException refusal(Source source) {
    try (MessageStream<StreamDownloadResponse> stream = open(source, 0)) {
      stream.next();
    } catch (StatusRuntimeException error) {
      return error;
    }
    return mismatch(source); // it has become available since the job was looked at
  }

  private Download fill(Source source, Path target, PartialFile file, DownloadOptions options)
      throws IOException {
    while (true) {
      if (file.size() > source.total()) {
        file.truncate(0);
      }
      long resumed = file.size();
      file.reserve(source.total() - resumed);
      try (Verifier verifier = new Verifier(source, file)) {
        verifier.written(resumed);
        transfer(source, file, verifier, options.progress());
        Download.VerifiedBy verifiedBy = verifier.finish();
        file.publish(options.overwrite());
        return new Download(
            target,
            source.total(),
            HexFormat.of().formatHex(source.sha256().toByteArray()),
            source.crc32c(),
            verifiedBy,
            resumed);
      } catch (InterruptedException interrupt) {
        throw Backoff.interrupted(interrupt);
      } catch (DamageException damage) {
        if (resumed == 0) {
          throw Status.DATA_LOSS
              .withDescription(damage.getMessage() + "; download again")
              .asRuntimeException();
        }
      }
      file.truncate(0); // what was left there was bad: once more, from the beginning
    }
  }

  private void transfer(
      Source source, PartialFile file, Verifier verifier, DownloadOptions.Progress progress)
      throws IOException {
    Backoff backoff = new Backoff(channel);
    long position = file.size();
    while (position < source.total()) {
      long before = position;
      int attempts = Backoff.ATTEMPTS;
      StatusRuntimeException problem =
          Status.UNAVAILABLE.withDescription("the download was cut short").asRuntimeException();
      // Read to its end, which the server's audit calls a complete download.
      try (MessageStream<StreamDownloadResponse> stream = open(source, position)) {
        for (var message = stream.next(); message != null; message = stream.next()) {
          if (message.hasMetadata()) {
            check(source, message.getMetadata());
          }
          if (!message.getData().isEmpty()) {
            file.write(verified(source, message, position), position);
            position += message.getData().size();
            verifier.written(position);
            progress.at(position, source.total());
          }
        }
      } catch (DamageException damage) {
        attempts = CORRUPT_ATTEMPTS;
        problem =
            Status.DATA_LOSS
                .withDescription(damage.getMessage() + " at byte " + position)
                .asRuntimeException();
      } catch (StatusRuntimeException error) {
        if (Thread.currentThread().isInterrupted() || !Errors.isCut(error)) {
          throw error;
        }
        problem = error;
      }
      if (position > before) {
        backoff.progress();
      }
      if (position < source.total()) {
        backoff.pause(problem, attempts);
      }
    }
  }

  private MessageStream<StreamDownloadResponse> open(Source source, long offset) {
    StreamDownloadRequest.Builder request =
        StreamDownloadRequest.newBuilder()
            .setJobId(source.jobId())
            .setReadOffset(offset)
            .setIfGenerationMatch(source.generation());
    source.part().ifPresent(request::setPartIndex);
    return MessageStream.open(channel, METHOD, request.build());
  }

  private static void check(Source source, DownloadMetadata metadata) {
    if (metadata.getGeneration() != source.generation()
        || metadata.getTotalBytes() != source.total()) {
      throw mismatch(source);
    }
  }

  /** The message's data, where it belongs at {@code position} and matches its checksum. */
  private ByteBuffer verified(Source source, StreamDownloadResponse message, long position)
      throws DamageException {
    ByteString data = message.getData();
    if (message.getOffset() != position) {
      throw new DamageException("bytes of offset " + message.getOffset() + " came");
    }
    if (data.size() > source.total() - position) {
      throw new DamageException("more bytes came than the file has");
    }
    if (data.size() > buffer.capacity()) {
      buffer = ByteBuffer.allocateDirect(data.size());
    }
    buffer.clear();
    data.copyTo(buffer);
    CRC32C crc = new CRC32C();
    crc.update(buffer.flip());
    if ((int) crc.getValue() != message.getCrc32C()) {
      throw new DamageException("bytes came that do not match their checksum");
    }
    return buffer.rewind();
  }

  private static StatusRuntimeException mismatch(Source source) {
    return Errors.of(
        Code.FAILED_PRECONDITION,
        GENERATION_MISMATCH,
        "the output of job " + source.jobId() + " is not the one that the download began with");
  }

  private static String key(Source source) {
    String job = FileNames.safe(source.jobId(), "job") + "-" + source.generation();
    return source.part().isPresent() ? job + "-" + source.part().getAsInt() : job;
  }
}
