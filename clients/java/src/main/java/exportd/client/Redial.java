package exportd.client;

import io.grpc.ConnectivityState;
import io.grpc.ManagedChannel;
import java.time.Duration;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ThreadLocalRandom;
import java.util.concurrent.TimeUnit;

/**
 * Has a channel whose server cannot be reached dial again: two to four times a second for 10 s,
 * every one to two seconds after that.
 *
 * <p>By itself gRPC waits longer each time, up to two minutes. A call's retries between are only
 * told the old failure, and each learns its fate before it waits: the last of those that the
 * service config asks for is lost unless the connection is there after 1 + 2 + 4 s, less a fifth by
 * chance.
 */
final class Redial {
  private static final Duration SOON = Duration.ofMillis(500);
  private static final Duration LATER = Duration.ofSeconds(2);
  private static final Duration PATIENCE = Duration.ofSeconds(10);

  private final ManagedChannel channel;
  private boolean down;
  private long downSince;

  Redial(ManagedChannel channel) {
    this.channel = channel;
  }

  /** Watch the channel until it is shut down. */
  void keep() {
    ConnectivityState state = channel.getState(false);
    if (state == ConnectivityState.TRANSIENT_FAILURE) {
      long wait = wait(down(), ThreadLocalRandom.current().nextDouble()).toMillis();
      CompletableFuture.delayedExecutor(wait, TimeUnit.MILLISECONDS)
          .execute(
              () -> {
                channel.resetConnectBackoff();
                keep();
              });
    } else if (state != ConnectivityState.SHUTDOWN) {
      if (state == ConnectivityState.READY) {
        up();
      }
      channel.notifyWhenStateChanged(state, this::keep);
    }
  }

  /** The wait when a server is down for so long; {@code chance}, from 0 to 1, takes half of it. */
  static Duration wait(Duration down, double chance) {
    Duration most = down.compareTo(PATIENCE) < 0 ? SOON : LATER;
    return Duration.ofMillis(Math.round(most.toMillis() * (1 - chance / 2)));
  }

  private synchronized Duration down() {
    if (!down) {
      down = true;
      downSince = System.nanoTime();
    }
    return Duration.ofNanos(System.nanoTime() - downSince);
  }

  private synchronized void up() {
    down = false;
  }
}
