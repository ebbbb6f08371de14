package exportd.client;

import exportd.v1.ExportServiceGrpc;
import exportd.v1.Job;
import exportd.v1.JobState;
import exportd.v1.WatchJobRequest;
import exportd.v1.WatchJobResponse;
import io.grpc.ManagedChannel;
import io.grpc.Status;
import io.grpc.StatusRuntimeException;
import java.time.Duration;
import java.util.Iterator;
import java.util.NoSuchElementException;

/**
 * A job each time it changed and every few seconds, up to and with its final state. Iterates once.
 * When the connection breaks it is followed over a new one; an error that would last is thrown as
 * {@link StatusRuntimeException}. Close it to leave off before the end.
 */
public final class JobStream implements Iterable<Job>, AutoCloseable {
  /** A stream that brings messages for so long was not one of those that break at once. */
  private static final Duration LASTED = Duration.ofSeconds(10);

  private final ManagedChannel channel;
  private final WatchJobRequest request;
  private final Backoff backoff;
  private volatile MessageStream<WatchJobResponse> stream;
  private volatile boolean closed;
  private boolean spoke;
  private long spokeFirst;
  private boolean iterated;
  private boolean ended;
  private long revision = -1;
  private boolean finalState;

  JobStream(ManagedChannel channel, WatchJobRequest request) {
    this.channel = channel;
    this.request = request;
    this.backoff = new Backoff(channel);
  }

  @Override
  public Iterator<Job> iterator() {
    if (iterated) {
      throw new IllegalStateException("a JobStream iterates once; call watch again");
    }
    iterated = true;
    return new Jobs();
  }

  /** May be called by another thread: the one that iterates comes to the end. */
  @Override
  public void close() {
    closed = true;
    backoff.end();
    hangUp();
  }

  private void hangUp() {
    MessageStream<WatchJobResponse> open = stream;
    if (open != null) {
      open.close();
    }
  }

  /** The next message's job, or null at the end. */
  private Job next() {
    while (!ended && !closed) {
      StatusRuntimeException problem =
          Status.UNAVAILABLE.withDescription("the watch was cut short").asRuntimeException();
      try {
        WatchJobResponse message = open().next();
        if (message != null) {
          return seen(message.getJob());
        }
        ended = finalState;
      } catch (StatusRuntimeException error) {
        if (closed) {
          return null;
        }
        ended = finalState && !request.getUntilDelivered();
        if (!ended && (Thread.currentThread().isInterrupted() || !Errors.isCut(error))) {
          close();
          throw error;
        }
        problem = error;
      }
      hangUp();
      stream = null;
      if (lasted()) {
        backoff.progress();
      }
      if (!ended && !closed) {
        backoff.pause(problem);
      }
    }
    return null;
  }

  private MessageStream<WatchJobResponse> open() {
    MessageStream<WatchJobResponse> open = stream;
    if (open == null) {
      open = MessageStream.open(channel, ExportServiceGrpc.getWatchJobMethod(), request);
      spoke = false;
      stream = open;
      if (closed) {
        hangUp(); // whoever closed it may not have seen this one
      }
    }
    return open;
  }

  /** Whether the stream was a good one, though it may have told nothing new. */
  private boolean lasted() {
    return spoke && System.nanoTime() - spokeFirst >= LASTED.toNanos();
  }

  private Job seen(Job job) {
    if (!spoke) {
      spoke = true;
      spokeFirst = System.nanoTime();
    }
    if (job.getRevision() != revision) {
      revision = job.getRevision();
      backoff.progress();
    }
    finalState = isFinal(job.getState());
    return job;
  }

  private static boolean isFinal(JobState state) {
    return switch (state) {
      case JOB_STATE_SUCCEEDED, JOB_STATE_FAILED, JOB_STATE_CANCELLED -> true;
      default -> false;
    };
  }

  private final class Jobs implements Iterator<Job> {
    private Job ahead;

    @Override
    public boolean hasNext() {
      if (ahead == null) {
        ahead = JobStream.this.next();
      }
      return ahead != null;
    }

    @Override
    public Job next() {
      if (!hasNext()) {
        throw new NoSuchElementException();
      }
      Job job = ahead;
      ahead = null;
      return job;
    }
  }
}
