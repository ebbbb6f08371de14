package exportd.client;

import static org.junit.jupiter.api.Assertions.assertArrayEquals;
import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertNotNull;
import static org.junit.jupiter.api.Assertions.assertNull;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import exportd.client.ScriptedServer.Break;
import exportd.v1.ExportServiceGrpc;
import exportd.v1.Job;
import io.grpc.CallOptions;
import io.grpc.Channel;
import io.grpc.ClientCall;
import io.grpc.MethodDescriptor;
import io.grpc.Status;
import io.grpc.Status.Code;
import io.grpc.StatusRuntimeException;
import java.io.IOException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.ArrayList;
import java.util.Collections;
import java.util.Iterator;
import java.util.List;
import java.util.Random;
import java.util.concurrent.FutureTask;
import java.util.concurrent.TimeUnit;
import java.util.stream.Stream;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.BeforeEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.Timeout;
import org.junit.jupiter.api.io.TempDir;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;

@Timeout(120)
class StreamsTest {
  @TempDir Path directory;
  private final byte[] content = new byte[10 * ScriptedServer.CHUNK];
  private ScriptedServer server;
  private ExportdClient client;

  @BeforeEach
  void connect() throws IOException {
    new Random(1).nextBytes(content);
    server = new ScriptedServer(content);
    client = server.client();
  }

  @AfterEach
  void hangUp() {
    client.close();
    server.close();
  }

  @ParameterizedTest
  @CsvSource({
    "UNAUTHENTICATED, UNAUTHENTICATED, 3000",
    "RESOURCE_EXHAUSTED, QUOTA_EXCEEDED, 3000",
    "NOT_FOUND, JOB_NOT_FOUND, 0",
  })
  void aRefusalKeepsTheBytesUnlessNothingCanCompleteThem(Code code, String reason, long next)
      throws IOException {
    server.breaks.add(new Break(3, Errors.of(code, reason, "")));
    Path target = directory.resolve("out");
    var error = assertThrows(StatusRuntimeException.class, () -> client.download("job", target));
    assertEquals(reason, Errors.reason(error));
    assertFalse(Files.exists(target));
    client.download("job", target);
    assertEquals(List.of(0L, next), server.offsets);
    assertArrayEquals(content, Files.readAllBytes(target));
    assertEquals(List.of(target), left());
  }

  @Test
  void anInterruptIsToldAsACancellationAndKeepsTheBytes() throws IOException {
    Path target = directory.resolve("out");
    DownloadOptions.Progress interrupting =
        (done, total) -> {
          if (done == 4000) {
            Thread.currentThread().interrupt();
          }
        };
    var error =
        assertThrows(
            StatusRuntimeException.class,
            () ->
                client.download("job", target, DownloadOptions.DEFAULT.withProgress(interrupting)));
    assertTrue(Thread.interrupted());
    assertEquals(Code.CANCELLED, error.getStatus().getCode());
    client.download("job", target);
    assertEquals(List.of(0L, 4000L), server.offsets);
  }

  @Test
  void onlyBadMessagesAtOnePlaceMakeADataLoss() throws IOException {
    for (int n = 0; n < 2; n++) {
      server.breaks.add(new Break(0, Status.UNAVAILABLE.asRuntimeException()));
      server.breaks.add(new Break(0, null));
    }
    server.breaks.add(new Break(1, null));
    Path target = directory.resolve("out");
    client.download("job", target);
    assertArrayEquals(content, Files.readAllBytes(target));

    server.breaks.addAll(Collections.nCopies(3, new Break(0, null)));
    var error =
        assertThrows(
            StatusRuntimeException.class,
            () -> client.download("job", target, DownloadOptions.DEFAULT.withOverwrite(true)));
    assertEquals(Code.DATA_LOSS, error.getStatus().getCode());
    assertTrue(server.breaks.isEmpty());
  }

  @Test
  void aWatchThatAnotherThreadClosesComesToItsEnd() throws Exception {
    JobStream jobs = client.watch("job");
    Iterator<Job> iterator = jobs.iterator();
    iterator.next();
    var more = new FutureTask<>(iterator::hasNext);
    Thread thread = new Thread(more);
    thread.start();
    while (thread.getState() != Thread.State.TIMED_WAITING) { // for a message
      Thread.onSpinWait();
    }
    jobs.close();
    assertFalse(more.get(60, TimeUnit.SECONDS));
  }

  @Test
  void aSingleCallHasADeadlineAndAStreamNone() {
    assertNotNull(
        optionsOf(ExportServiceGrpc.getGetJobMethod(), CallOptions.DEFAULT).getDeadline());
    assertNull(optionsOf(ExportServiceGrpc.getWatchJobMethod(), CallOptions.DEFAULT).getDeadline());
    CallOptions own = CallOptions.DEFAULT.withDeadlineAfter(99, TimeUnit.HOURS);
    assertEquals(own, optionsOf(ExportServiceGrpc.getGetJobMethod(), own));
  }

  private <R, T> CallOptions optionsOf(MethodDescriptor<R, T> method, CallOptions options) {
    List<CallOptions> seen = new ArrayList<>();
    Channel recording =
        new Channel() {
          @Override
          public <A, B> ClientCall<A, B> newCall(MethodDescriptor<A, B> called, CallOptions with) {
            seen.add(with);
            return client.channel().newCall(called, with);
          }

          @Override
          public String authority() {
            return client.channel().authority();
          }
        };
    new DefaultDeadline().interceptCall(method, options, recording);
    return seen.get(0);
  }

  private List<Path> left() throws IOException {
    try (Stream<Path> files = Files.list(directory)) {
      return files.toList();
    }
  }
}
