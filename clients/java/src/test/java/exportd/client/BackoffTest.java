package exportd.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertSame;
import static org.junit.jupiter.api.Assertions.assertThrows;

import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import java.time.Duration;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;

class BackoffTest {
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
    var channel =
        Grpc.newChannelBuilder("localhost:1", InsecureChannelCredentials.create()).build();
    try {
      Backoff backoff = new Backoff(channel);
      StatusRuntimeException error = Status.UNAVAILABLE.asRuntimeException();
      backoff.pause(error, 2);
      backoff.progress();
      backoff.pause(error, 2);
      assertSame(error, assertThrows(StatusRuntimeException.class, () -> backoff.pause(error, 2)));
    } finally {
      channel.shutdownNow();
    }
  }
}
