package exportd.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertSame;
import static org.junit.jupiter.api.Assertions.assertThrows;

import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import java.time.Duration;
import org.junit.jupiter.api.AfterEach;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;

class BackoffTest {
  private final ManagedChannel channel =
      Grpc.newChannelBuilder("localhost:1", InsecureChannelCredentials.create()).build();

  @AfterEach
  void hangUp() {
    channel.shutdownNow();
  }

  @ParameterizedTest
  @CsvSource({"1, 100, 50", "2, 200, 100", "6, 3200, 1600", "7, 5000, 2500", "99, 5000, 2500"})
  void waitsDoubleUpToFiveSecondsAndLeaveHalfToChance(int failures, long most, long least) {
    assertEquals(most, Backoff.delay(failures, 0, Duration.ZERO).toMillis());
    assertEquals(least, Backoff.delay(failures, 1, Duration.ZERO).toMillis());
  }

  @Test
  void whatTheServerAsksForCountsAsFarAsFiveSeconds() {
    assertEquals(Duration.ofSeconds(2), Backoff.delay(1, 0.5, Duration.ofSeconds(2)));
    assertEquals(Duration.ofSeconds(5), Backoff.delay(1, 0.5, Duration.ofHours(1)));
  }

  @Test
  void theLastFailureIsTheErrorItselfAndProgressBeginsTheCountAnew() {
    Backoff backoff = new Backoff(channel);
    backoff.end(); // no waits
    StatusRuntimeException error = Status.UNAVAILABLE.asRuntimeException();
    for (int n = 1; n < Backoff.ATTEMPTS; n++) {
      backoff.pause(error);
    }
    backoff.progress();
    for (int n = 1; n < Backoff.ATTEMPTS; n++) {
      backoff.pause(error);
    }
    assertSame(error, assertThrows(StatusRuntimeException.class, () -> backoff.pause(error)));
  }

  @Test
  void aClientThatWasClosedIsNotTriedAgain() {
    channel.shutdownNow();
    StatusRuntimeException error = Status.UNAVAILABLE.asRuntimeException();
    Backoff backoff = new Backoff(channel);
    assertSame(error, assertThrows(StatusRuntimeException.class, () -> backoff.pause(error)));
  }

  @ParameterizedTest
  @CsvSource({"0, 500, 250", "9, 500, 250", "10, 2000, 1000", "9999, 2000, 1000"})
  void aServerThatStaysAwayIsDialledLessOften(int secondsDown, long most, long least) {
    Duration down = Duration.ofSeconds(secondsDown);
    assertEquals(most, Redial.wait(down, 0).toMillis());
    assertEquals(least, Redial.wait(down, 1).toMillis());
  }
}
