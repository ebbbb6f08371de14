package exportd.client;

import exportd.client.Verifier.DamageException;
import exportd.v1.DownloadMetadata;
import exportd.v1.ExportServiceGrpc;
import exportd.v1.ExportServiceGrpc.ExportServiceBlockingStub;
import exportd.v1.GetJobRequest;
import exportd.v1.Job;
import exportd.v1.StreamDownloadRequest;
import io.grpc.ManagedChannel;
import io.grpc.MethodDescriptor;
import io.grpc.Status;
import io.grpc.Status.Code;
import io.grpc.StatusRuntimeException;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.channels.ClosedChannelException;
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

  /** Bad messages at one place before the data counts as lost. */
  private static final int CORRUPT_ATTEMPTS = 3;

  private final ExportServiceBlockingStub stub;
  private final ManagedChannel channel;
  private final Chunk.Marshaller chunks = new Chunk.Marshaller();
  private final MethodDescriptor<StreamDownloadRequest, Chunk> method;

  Downloader(ExportServiceBlockingStub stub, ManagedChannel channel) {
    this.stub = stub;
    this.channel = channel;
    method =
        ExportServiceGrpc.getStreamDownloadMethod().toBuilder(
                ExportServiceGrpc.getStreamDownloadMethod().getRequestMarshaller(), chunks)
            .build();
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
    var name = new PartialName(target, source.jobId(), source.generation(), source.part());
    try (PartialFile file = PartialFile.open(target, name.path())) {
      name.removeOlder();
      try {
        return fill(source, target, file, options);
      } catch (StatusRuntimeException error) {
        if (Errors.isGone(error)) {
          file.delete();
        }
        throw error;
      }
    } catch (ClosedChannelException error) {
      // An interrupt closes the file under whatever is done with it.
      if (Thread.currentThread().isInterrupted()) {
        throw Backoff.interrupted(error);
      }
      throw error;
    }
  }

  /** What the server says to a download of what the manifest does not offer. */
  private StatusRuntimeException refusal(Source source) {
    Backoff backoff = new Backoff(channel);
    while (true) {
      try (MessageStream<Chunk> stream = open(source, 0)) {
        stream.next();
        return mismatch(source); // it has become available since the job was looked at
      } catch (StatusRuntimeException error) {
        if (Thread.currentThread().isInterrupted() || !Errors.isCut(error)) {
          return error;
        }
        backoff.pause(error);
      }
    }
  }

  private Download fill(Source source, Path target, PartialFile file, DownloadOptions options)
      throws IOException {
    while (true) {
      if (file.size() > source.total()) {
        file.truncate(0);
      }
      long resumed = file.size();
      file.reserve(source.total() - resumed);
      try (Verifier verifier = new Verifier(source, file, chunks)) {
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
          file.delete();
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
      throws IOException, InterruptedException {
    Backoff backoff = new Backoff(channel);
    long position = file.size();
    long badPlace = -1;
    int bad = 0;
    while (position < source.total()) {
      long before = position;
      StatusRuntimeException problem =
          Status.UNAVAILABLE.withDescription("the download was cut short").asRuntimeException();
      // Read to its end, which the server's audit calls a complete download.
      try (MessageStream<Chunk> stream = open(source, position)) {
        for (Chunk chunk = stream.next(); chunk != null; chunk = stream.next()) {
          if (chunk.message().hasMetadata()) {
            check(source, chunk.message().getMetadata());
          }
          if (chunk.data().hasRemaining()) {
            check(source, chunk, position);
            file.write(chunk.data(), position);
            position += chunk.data().remaining();
            verifier.written(chunk);
            progress.at(position, source.total());
          }
        }
      } catch (DamageException damage) {
        problem =
            Status.DATA_LOSS
                .withDescription(damage.getMessage() + " at byte " + position)
                .asRuntimeException();
        bad = position == badPlace ? bad + 1 : 1;
        badPlace = position;
        if (bad == CORRUPT_ATTEMPTS) {
          throw problem;
        }
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
        backoff.pause(problem);
      }
    }
  }

  private MessageStream<Chunk> open(Source source, long offset) {
    StreamDownloadRequest.Builder request =
        StreamDownloadRequest.newBuilder()
            .setJobId(source.jobId())
            .setReadOffset(offset)
            .setIfGenerationMatch(source.generation());
    source.part().ifPresent(request::setPartIndex);
    return MessageStream.open(channel, method, request.build());
  }

  private static void check(Source source, DownloadMetadata metadata) {
    if (metadata.getGeneration() != source.generation()
        || metadata.getTotalBytes() != source.total()) {
      throw mismatch(source);
    }
  }

  /** Whether the data belongs at {@code position} and matches its checksum. */
  private static void check(Source source, Chunk chunk, long position) throws DamageException {
    ByteBuffer data = chunk.data();
    if (chunk.message().getOffset() != position) {
      throw new DamageException("bytes of offset " + chunk.message().getOffset() + " came");
    }
    if (data.remaining() > source.total() - position) {
      throw new DamageException("more bytes came than the file has");
    }
    CRC32C crc = new CRC32C();
    crc.update(data);
    if ((int) crc.getValue() != chunk.message().getCrc32C()) {
      throw new DamageException("bytes came that do not match their checksum");
    }
  }

  private static StatusRuntimeException mismatch(Source source) {
    return Errors.of(
        Code.FAILED_PRECONDITION,
        GENERATION_MISMATCH,
        "the output of job " + source.jobId() + " is not the one that the download began with");
  }
}
