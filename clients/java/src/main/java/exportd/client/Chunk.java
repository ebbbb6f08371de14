package exportd.client;

import com.google.protobuf.CodedInputStream;
import com.google.protobuf.UnsafeByteOperations;
import exportd.v1.StreamDownloadResponse;
import io.grpc.HasByteBuffer;
import io.grpc.KnownLength;
import io.grpc.MethodDescriptor;
import io.grpc.Status;
import java.io.IOException;
import java.io.InputStream;
import java.nio.ByteBuffer;
import java.util.Queue;
import java.util.concurrent.ConcurrentLinkedQueue;

/**
 * A message of a download, and the memory that its data lies in, which is used again for a later
 * one. gRPC's own marshaller makes two arrays of each message, which for a download is everything
 * twice.
 */
record Chunk(StreamDownloadResponse message, ByteBuffer memory) {
  /** Without a copy; gone when the memory is given back. */
  ByteBuffer data() {
    return message.getData().asReadOnlyByteBuffer();
  }

  /**
   * Reads chunks into memory of its own, outside the heap, where files are written from without
   * another copy. Chunks that nobody gives back are left to the garbage collector.
   */
  static final class Marshaller implements MethodDescriptor.Marshaller<Chunk> {
    private final Queue<ByteBuffer> free = new ConcurrentLinkedQueue<>();

    @Override
    public InputStream stream(Chunk chunk) {
      throw new UnsupportedOperationException("chunks are received only");
    }

    @Override
    public Chunk parse(InputStream stream) {
      try {
        ByteBuffer memory = read(stream);
        CodedInputStream input = UnsafeByteOperations.unsafeWrap(memory).newCodedInput();
        input.enableAliasing(true);
        return new Chunk(StreamDownloadResponse.parseFrom(input), memory);
      } catch (IOException malformed) {
        throw Status.INTERNAL
            .withDescription("a message cannot be parsed")
            .withCause(malformed)
            .asRuntimeException();
      }
    }

    /** Nobody looks at the chunk any more. */
    void giveBack(Chunk chunk) {
      free.add(chunk.memory());
    }

    private ByteBuffer read(InputStream stream) throws IOException {
      if (!(stream instanceof KnownLength)) { // compressed
        return ByteBuffer.wrap(stream.readAllBytes());
      }
      ByteBuffer memory = take(stream.available());
      if (stream instanceof HasByteBuffer pieces && pieces.byteBufferSupported()) {
        while (stream.available() > 0) {
          ByteBuffer piece = pieces.getByteBuffer();
          int bytes = piece.remaining();
          memory.put(piece);
          stream.skip(bytes);
        }
      } else {
        memory.put(stream.readAllBytes());
      }
      return memory.flip();
    }

    private ByteBuffer take(int bytes) {
      ByteBuffer memory = free.poll();
      return memory == null || memory.capacity() < bytes
          ? ByteBuffer.allocateDirect(bytes)
          : memory.clear();
    }
  }
}
