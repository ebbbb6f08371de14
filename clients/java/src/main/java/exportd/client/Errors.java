package exportd.client;

import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.protobuf.Message;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RetryInfo;
import com.google.rpc.Status;
import io.grpc.Status.Code;
import io.grpc.StatusRuntimeException;
import io.grpc.protobuf.StatusProto;
import java.time.Duration;
import java.util.EnumSet;
import java.util.Optional;
import java.util.Set;

/** What exportd says in its errors beyond code and message. */
public final class Errors {
  private static final String DOMAIN = "exportd";

  /**
   * Codes that proxies and broken connections produce. With a reason of exportd's they would be an
   * answer; without one the stream was merely cut.
   */
  private static final Set<Code> CUT =
      EnumSet.of(
          Code.INTERNAL,
          Code.UNKNOWN,
          Code.CANCELLED,
          Code.ABORTED,
          Code.DEADLINE_EXCEEDED,
          Code.RESOURCE_EXHAUSTED);

  /** Reasons after which the bytes of an output can never be completed. */
  private static final Set<String> GONE =
      Set.of(
          "JOB_NOT_FOUND",
          "PART_NOT_FOUND",
          "OUTPUT_EXPIRED",
          "OUTPUT_DROPPED",
          "JOB_FAILED",
          "JOB_CANCELLED",
          "GENERATION_MISMATCH",
          "PARTS_NOT_JOINABLE");

  /** More is cut down to this: the sum of the largest that can be sent overflows. */
  private static final long MAX_RETRY_SECONDS = 24 * 60 * 60;

  private Errors() {}

  /**
   * The reason of an error, such as {@code JOB_NOT_FOUND}: a name of {@code ErrorReason} without
   * its prefix.
   *
   * @return empty when the error does not come from exportd itself
   */
  public static String reason(Throwable error) {
    return detail(error, ErrorInfo.getDefaultInstance())
        .filter(info -> info.getDomain().equals(DOMAIN))
        .map(ErrorInfo::getReason)
        .orElse("");
  }

  /** How long the server asks to wait before the next try; zero when it says nothing. */
  static Duration retryDelay(Throwable error) {
    return detail(error, RetryInfo.getDefaultInstance())
        .map(RetryInfo::getRetryDelay)
        .filter(delay -> delay.getSeconds() >= 0 && delay.getNanos() >= 0)
        .map(
            delay ->
                Duration.ofSeconds(
                    Math.min(delay.getSeconds(), MAX_RETRY_SECONDS), delay.getNanos()))
        .orElse(Duration.ZERO);
  }

  /** Whether a stream that ended so may be resumed. */
  static boolean isCut(StatusRuntimeException error) {
    Code code = error.getStatus().getCode();
    String reason = reason(error);
    return code == Code.UNAVAILABLE
        || reason.equals("READER_STALLED")
        || (reason.equals("QUOTA_EXCEEDED") && saysWhen(error))
        || (reason.isEmpty() && CUT.contains(code));
  }

  /** Whether nothing will ever complete what was downloaded before. */
  static boolean isGone(StatusRuntimeException error) {
    return GONE.contains(reason(error));
  }

  private static boolean saysWhen(Throwable error) {
    return detail(error, RetryInfo.getDefaultInstance()).isPresent();
  }

  /** An error as the server would make it. */
  static StatusRuntimeException of(Code code, String reason, String message) {
    return StatusProto.toStatusRuntimeException(
        Status.newBuilder()
            .setCode(code.value())
            .setMessage(message)
            .addDetails(
                Any.pack(ErrorInfo.newBuilder().setDomain(DOMAIN).setReason(reason).build()))
            .build());
  }

  /** The first detail of the wanted type. One that cannot be read must not hide the error. */
  private static <T extends Message> Optional<T> detail(Throwable error, T wanted) {
    Status status = status(error);
    if (status != null) {
      for (Any detail : status.getDetailsList()) {
        if (detail.is(wanted.getClass())) {
          try {
            @SuppressWarnings("unchecked") // unpack gives what it was asked for
            T found = (T) detail.unpack(wanted.getClass());
            return Optional.of(found);
          } catch (InvalidProtocolBufferException unreadable) {
            continue;
          }
        }
      }
    }
    return Optional.empty();
  }

  /** Null when there is none, or what came as one is not: that may be a proxy's. */
  private static Status status(Throwable error) {
    try {
      return StatusProto.fromThrowable(error);
    } catch (IllegalArgumentException unreadable) {
      return null;
    }
  }
}
