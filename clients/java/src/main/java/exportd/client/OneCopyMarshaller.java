package exportd.client;

import com.google.protobuf.CodedInputStream;
import com.google.protobuf.Message;
import com.google.protobuf.Parser;
import io.grpc.KnownLength;
import io.grpc.MethodDescriptor;
import io.grpc.Status;
import java.io.IOException;
import java.io.InputStream;

/**
 * Parses messages whose bytes fields share the array that the message was read into. gRPC's own
 * marshaller copies them once more, which for a download is a copy of everything.
 */
final class OneCopyMarshaller<T extends Message> implements MethodDescriptor.Marshaller<T> {
  private final MethodDescriptor.Marshaller<T> usual;
  private final Parser<T> parser;

  OneCopyMarshaller(MethodDescriptor.Marshaller<T> usual, Parser<T> parser) {
    this.usual = usual;
    this.parser = parser;
  }

  @Override
  public InputStream stream(T value) {
    return usual.stream(value);
  }

  @Override
  public T parse(InputStream stream) {
    if (!(stream instanceof KnownLength)) {
      return usual.parse(stream); // compressed: its size is not known before the end
    }
    try {
      byte[] bytes = new byte[stream.available()];
      CodedInputStream input =
          CodedInputStream.newInstance(bytes, 0, stream.readNBytes(bytes, 0, bytes.length));
      input.enableAliasing(true);
      T message = parser.parseFrom(input);
      input.checkLastTagWas(0);
      return message;
    } catch (IOException malformed) {
      throw Status.INTERNAL
          .withDescription("a message cannot be parsed")
          .withCause(malformed)
          .asRuntimeException();
    }
  }
}
