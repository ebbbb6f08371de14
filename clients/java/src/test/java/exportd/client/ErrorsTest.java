package exportd.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.protobuf.Any;
import com.google.protobuf.Duration;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RetryInfo;
import com.google.rpc.Status;
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
