package exportd.client;

import io.grpc.ManagedChannel;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import java.time.Duration;
import java.util.concurrent.CountDownLatch;
import java.util.concurrent.ThreadLocalRandom;
import java.util.concurrent.TimeUnit;

/**
 * The waits between the streams of one watch or download: 0.1 s, doubling up to 5 s, of which up to
 * half is left to chance so that clients do not march in step.
 */
final class Backoff {
  /** Failures in a row, without anything new between, after which a stream is given up. */
  static final int ATTEMPTS = 10;

  private static final Duration INITIAL = Duration.ofMillis(100);
  private static final Duration MAXIMUM = Duration.ofSeconds(5);

  private final ManagedChannel channel;
  private final CountDownLatch ended = new CountDownLatch(1);
  private int failures;

  Backoff(ManagedChannel channel) {
    this.channel = channel;
  }

  /** Something new came: failures before it no longer count. */
  void progress() {
    failures = 0;
  }

  /** Nobody wants to wait any more; may be called by another thread. */
  void end() {
    ended.countDown();
  }

  /**
   * Wait before the next attempt.
   *
   * @throws StatusRuntimeException {@code error} itself once there were {@link #ATTEMPTS} failures,
   *     or when the client was closed
   */
  void pause(StatusRuntimeException error) {
    failures++;
    if (failures >= ATTEMPTS || channel.isShutdown()) {
      throw error;
    }
    double chance = ThreadLocalRandom.current().nextDouble();
    Duration wait = delay(failures, chance, Errors.retryDelay(error));
    try {
      if (ended.await(wait.toMillis(), TimeUnit.MILLISECONDS)) {
        return;
      }
    } catch (InterruptedException interrupt) {
      throw interrupted(interrupt);
    }
    // gRPC waits longer than that before it dials again, up to two minutes.
    channel.resetConnectBackoff();
  }

  /** The wait after so many failures; {@code chance} is from 0 to 1. */
  static Duration delay(int failures, double chance, Duration askedFor) {
    long doubled = INITIAL.toMillis() << Math.min(failures - 1, 30);
    double most = Math.min(MAXIMUM.toMillis(), doubled);
    long wait = Math.round(most * (1 - chance / 2));
    long asked = Math.min(MAXIMUM.toMillis(), askedFor.toMillis());
    return Duration.ofMillis(Math.max(wait, asked));
  }

  /** As gRPC's own blocking calls tell it: an error, and the thread's flag set again. */
  static StatusRuntimeException interrupted(Exception cause) {
    Thread.currentThread().interrupt();
    return Status.CANCELLED
        .withDescription("the thread was interrupted")
        .withCause(cause)
        .asRuntimeException();
  }
}
