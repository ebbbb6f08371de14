package exportd.client;

import io.grpc.ConnectivityState;
import io.grpc.ManagedChannel;
import java.util.concurrent.CompletableFuture;
import java.util.concurrent.ThreadLocalRandom;
import java.util.concurrent.TimeUnit;

/**
 * Has a channel whose server cannot be reached dial again two to four times a second.
 *
 * <p>By itself gRPC waits longer each time, up to two minutes. A call's retries between are only
 * told the old failure, and each learns its fate before it waits: the last of those that the
 * service config asks for is lost unless the connection is there after 1 + 2 + 4 s, less a fifth by
 * chance.
 */
final class Redial {
  private static final long MILLIS = 250;

  private Redial() {}

  /** Watch the channel until it is shut down. */
  static void keep(ManagedChannel channel) {
    ConnectivityState state = channel.getState(false);
    if (state == ConnectivityState.TRANSIENT_FAILURE) {
      long wait = MILLIS + ThreadLocalRandom.current().nextLong(MILLIS);
      CompletableFuture.delayedExecutor(wait, TimeUnit.MILLISECONDS)
          .execute(
              () -> {
                channel.resetConnectBackoff();
                keep(channel);
              });
    } else if (state != ConnectivityState.SHUTDOWN) {
      channel.notifyWhenStateChanged(state, () -> keep(channel));
    }
  }
}
