package exportd.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.protobuf.Any;
import com.google.protobuf.Duration;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RetryInfo;
import com.google.rpc.Status;
import io.grpc.Metadata;
import io.grpc.Status.Code;
import io.grpc.StatusRuntimeException;
import io.grpc.protobuf.StatusProto;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;

class ErrorsTest {
  @Test
  void onlyExportdsOwnReasonCounts() {
    assertEquals("JOB_FAILED", Errors.reason(Errors.of(Code.INTERNAL, "JOB_FAILED", "")));
    assertEquals("", Errors.reason(io.grpc.Status.INTERNAL.asRuntimeException()));
    assertEquals("", Errors.reason(new IllegalStateException()));
    Any others = Any.pack(ErrorInfo.newBuilder().setDomain("proxy").setReason("BUSY").build());
    assertEquals("", Errors.reason(of(Code.UNAVAILABLE, others)));
  }

  @Test
  void theServersWaitIsReadAndWhatCannotBeReadIsPassedBy() {
    Any broken =
        Any.pack(RetryInfo.getDefaultInstance()).toBuilder()
            .setValue(com.google.protobuf.ByteString.copyFromUtf8("\u0007"))
            .build();
    Any wait =
        Any.pack(RetryInfo.newBuilder().setRetryDelay(Duration.newBuilder().setSeconds(3)).build());
    assertEquals(3, Errors.retryDelay(of(Code.UNAVAILABLE, broken, wait)).toSeconds());
    assertEquals(0, Errors.retryDelay(of(Code.UNAVAILABLE)).toSeconds());
  }

  @Test
  void detailsThatCannotBeReadAreNoReason() {
    Metadata trailers = new Metadata();
    trailers.put(
        Metadata.Key.of("grpc-status-details-bin", Metadata.BINARY_BYTE_MARSHALLER),
        new byte[] {(byte) 0xff, 1, 2});
    var error = io.grpc.Status.UNAVAILABLE.asRuntimeException(trailers);
    assertEquals("", Errors.reason(error));
    assertTrue(Errors.isCut(error));
  }

  @Test
  void aQuotaIsWaitedForWhenTheServerSaysHowLong() {
    var info = ErrorInfo.newBuilder().setDomain("exportd").setReason("QUOTA_EXCEEDED").build();
    Duration wait = Duration.newBuilder().setSeconds(Long.MAX_VALUE).setNanos(999_999_999).build();
    var error =
        of(
            Code.RESOURCE_EXHAUSTED,
            Any.pack(info),
            Any.pack(RetryInfo.newBuilder().setRetryDelay(wait).build()));
    assertTrue(Errors.isCut(error));
    assertEquals(5000, Backoff.delay(1, 0, Errors.retryDelay(error)).toMillis());
  }

  @ParameterizedTest
  @CsvSource({
    "NOT_FOUND, JOB_NOT_FOUND, true",
    "FAILED_PRECONDITION, OUTPUT_EXPIRED, true",
    "UNAUTHENTICATED, UNAUTHENTICATED, false",
    "PERMISSION_DENIED, PERMISSION_DENIED, false",
    "RESOURCE_EXHAUSTED, QUOTA_EXCEEDED, false",
  })
  void onlySomeReasonsMeanThatTheOutputIsGone(Code code, String reason, boolean gone) {
    assertEquals(gone, Errors.isGone(Errors.of(code, reason, "")));
  }

  @ParameterizedTest
  @CsvSource({
    "UNAVAILABLE, DRAINING, true",
    "UNAVAILABLE, LEDGER_UNAVAILABLE, true",
    "RESOURCE_EXHAUSTED, READER_STALLED, true",
    "RESOURCE_EXHAUSTED, QUOTA_EXCEEDED, false",
    "INTERNAL, INTERNAL, false",
    "NOT_FOUND, JOB_NOT_FOUND, false",
  })
  void aReasonIsAnAnswerUnlessItSaysToComeAgain(Code code, String reason, boolean cut) {
    assertEquals(cut, Errors.isCut(Errors.of(code, reason, "")));
  }

  @Test
  void aBrokenConnectionIsACutAndARefusalIsNot() {
    for (Code code : new Code[] {Code.UNAVAILABLE, Code.INTERNAL, Code.UNKNOWN, Code.CANCELLED}) {
      assertTrue(Errors.isCut(of(code)), code.name());
    }
    for (Code code : new Code[] {Code.UNAUTHENTICATED, Code.UNIMPLEMENTED, Code.DATA_LOSS}) {
      assertFalse(Errors.isCut(of(code)), code.name());
    }
  }

  private static StatusRuntimeException of(Code code, Any... details) {
    Status.Builder status = Status.newBuilder().setCode(code.value());
    for (Any detail : details) {
      status.addDetails(detail);
    }
    return StatusProto.toStatusRuntimeException(status.build());
  }
}
