package exportd.client;

import io.grpc.CallOptions;
import io.grpc.Channel;
import io.grpc.ClientCall;
import io.grpc.Metadata;
import io.grpc.MethodDescriptor;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import java.time.Duration;
import java.util.concurrent.BlockingQueue;
import java.util.concurrent.LinkedBlockingQueue;
import java.util.concurrent.TimeUnit;

/**
 * A call that streams answers, read by one thread with a limit on its silence, which the blocking
 * stubs do not have.
 */
final class MessageStream<T> implements AutoCloseable {
  /** A server that says nothing for so long is taken for dead. */
  static final Duration SILENCE = Duration.ofSeconds(60);

  /** Messages that may wait here: enough that the network goes on while one is worked on. */
  private static final int AHEAD = 4;

  private record Event<T>(T message, StatusRuntimeException error) {}

  private final ClientCall<?, T> call;
  // Bounded by what was asked for.
  private final BlockingQueue<Event<T>> events = new LinkedBlockingQueue<>();
  private boolean ended;

  private MessageStream(ClientCall<?, T> call) {
    this.call = call;
  }

  static <R, T> MessageStream<T> open(Channel channel, MethodDescriptor<R, T> method, R request) {
    // The listener only queues: gRPC's own thread can do that, without waking another.
    ClientCall<R, T> call =
        channel.newCall(method, CallOptions.DEFAULT.withExecutor(Runnable::run));
    MessageStream<T> stream = new MessageStream<>(call);
    call.start(stream.new Listener(), new Metadata());
    call.request(AHEAD);
    call.sendMessage(request);
    call.halfClose();
    return stream;
  }

  /**
   * The next message, or null at the end.
   *
   * @throws StatusRuntimeException the stream failed, was silent for too long, or the thread was
   *     interrupted
   */
  T next() {
    if (ended) {
      return null;
    }
    Event<T> event;
    try {
      event = events.poll(SILENCE.toNanos(), TimeUnit.NANOSECONDS);
    } catch (InterruptedException interrupt) {
      throw Backoff.interrupted(interrupt);
    }
    if (event == null) {
      throw Status.UNAVAILABLE
          .withDescription("the server sent nothing for " + SILENCE.toSeconds() + " s")
          .asRuntimeException();
    }
    if (event.message() != null) {
      call.request(1);
      return event.message();
    }
    ended = true;
    if (event.error() != null) {
      throw event.error();
    }
    return null;
  }

  @Override
  public void close() {
    if (!ended) {
      call.cancel("no longer read", null);
    }
  }

  private final class Listener extends ClientCall.Listener<T> {
    @Override
    public void onMessage(T message) {
      events.add(new Event<>(message, null));
    }

    @Override
    public void onClose(Status status, Metadata trailers) {
      events.add(new Event<>(null, status.isOk() ? null : status.asRuntimeException(trailers)));
    }
  }
}
