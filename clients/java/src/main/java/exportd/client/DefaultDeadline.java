package exportd.client;

import io.grpc.CallOptions;
import io.grpc.Channel;
import io.grpc.ClientCall;
import io.grpc.ClientInterceptor;
import io.grpc.Context;
import io.grpc.MethodDescriptor;
import io.grpc.MethodDescriptor.MethodType;
import java.time.Duration;
import java.util.concurrent.TimeUnit;

/** Ends single calls that take too long, retries included, when the caller has set no deadline. */
final class DefaultDeadline implements ClientInterceptor {
  static final Duration LIMIT = Duration.ofSeconds(30);

  @Override
  public <R, T> ClientCall<R, T> interceptCall(
      MethodDescriptor<R, T> method, CallOptions options, Channel next) {
    boolean open =
        method.getType() == MethodType.UNARY
            && options.getDeadline() == null
            && Context.current().getDeadline() == null;
    return next.newCall(
        method, open ? options.withDeadlineAfter(LIMIT.toSeconds(), TimeUnit.SECONDS) : options);
  }
}
