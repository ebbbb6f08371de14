package exportd.client;

import com.google.protobuf.ByteString;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.security.MessageDigest;
import java.security.NoSuchAlgorithmException;
import java.util.ArrayDeque;
import java.util.ArrayList;
import java.util.Deque;
import java.util.List;
import java.util.zip.CRC32C;

/**
 * Holds a file against its checksums, on a thread of its own behind what is written: hashing then
 * costs no time of its own. Chunks are hashed from memory; what an earlier download left in the
 * file, and what comes while that is hashed, is read back.
 *
 * <p>A part of a joined file is rebuilt from the header and the trailer that the joined file
 * carries once. That can fail without any damage, when two headers of equal length differ; the
 * CRC32C of the whole decides then.
 */
final class Verifier implements AutoCloseable {
  /** The file is not what the manifest says. */
  static final class DamageException extends Exception {
    private static final long serialVersionUID = 1;

    DamageException(String message) {
      super(message);
    }
  }

  private static final int BLOCK = 1024 * 1024;

  /** Chunks that may wait in memory to be hashed. */
  private static final int AHEAD = 4;

  private final Source source;
  private final PartialFile file;
  private final Chunk.Marshaller chunks;
  private final Thread thread = new Thread(this::run, "exportd-verify");
  private final List<MessageDigest> digests = new ArrayList<>();
  private final CRC32C crc = new CRC32C();
  private final ByteBuffer block = ByteBuffer.allocate(BLOCK);
  private long pieceEnd;
  private long hashed;
  private long fileEnd;

  // Guarded by this.
  private final Deque<Chunk> inHand = new ArrayDeque<>();
  private boolean takesChunks;
  private long written;
  private boolean closed;
  private IOException failure;

  /**
   * Starts the thread.
   *
   * @param chunks where chunks go once they are hashed
   */
  Verifier(Source source, PartialFile file, Chunk.Marshaller chunks) {
    this.source = source;
    this.file = file;
    this.chunks = chunks;
    thread.setDaemon(true);
    thread.start();
  }

  /** So many bytes are in the file. */
  synchronized void written(long bytes) {
    written = bytes;
    notifyAll();
  }

  /**
   * The next bytes of the file are there, and these. The chunk is not the caller's any more. Waits
   * while enough of them are in hand, but not for what is read back, which can be long.
   */
  synchronized void written(Chunk chunk) throws InterruptedException {
    while (inHand.size() == AHEAD && takesChunks) {
      wait();
    }
    written += chunk.message().getData().size();
    if (inHand.size() < AHEAD) {
      inHand.add(chunk);
    } else {
      chunks.giveBack(chunk);
    }
    notifyAll();
  }

  /**
   * Wait until all is hashed, and compare.
   *
   * @return what vouches for every byte
   * @throws DamageException a checksum does not hold
   */
  Download.VerifiedBy finish() throws IOException, InterruptedException, DamageException {
    thread.join();
    synchronized (this) {
      if (failure != null) {
        throw failure;
      }
    }
    if (hashed != source.total()) {
      throw new DamageException(hashed + " bytes are here, " + source.total() + " should be");
    }
    while (digests.size() < source.pieces().size()) {
      beginPiece(); // empty ones at the end
    }
    boolean proven = true;
    for (int n = 0; n < digests.size(); n++) {
      proven &= holds(source.pieces().get(n), digests.get(n));
    }
    if ((int) crc.getValue() != source.crc32c()) {
      throw new DamageException("the file does not match its CRC32C");
    }
    return proven ? Download.VerifiedBy.SHA256 : Download.VerifiedBy.CRC32C;
  }

  /** Stop hashing; the file is not touched after that. */
  @Override
  public void close() {
    synchronized (this) {
      closed = true;
      notifyAll();
    }
    boolean interrupted = false;
    while (thread.isAlive()) {
      try {
        thread.join();
      } catch (InterruptedException interrupt) {
        interrupted = true;
      }
    }
    if (interrupted) {
      Thread.currentThread().interrupt();
    }
  }

  private void run() {
    try {
      while (hashed < source.total()) {
        Chunk chunk = awaitMore();
        if (chunk != null) {
          hash(chunk.data());
          chunks.giveBack(chunk);
        } else if (hashed == fileEnd || !readBack()) {
          return;
        }
      }
    } catch (IOException error) {
      synchronized (this) {
        failure = error;
      }
    } catch (InterruptedException nobodyDoes) {
      Thread.currentThread().interrupt();
    } finally {
      takeChunks(false);
    }
  }

  /**
   * Waits for something to hash.
   *
   * @return the chunk that comes next; null when bytes up to {@code fileEnd} come first, which is
   *     no further than before when it is closed
   */
  private synchronized Chunk awaitMore() throws InterruptedException {
    while (written <= hashed && !closed) {
      wait();
    }
    if (closed) {
      fileEnd = hashed;
      return null;
    }
    fileEnd = inHand.isEmpty() ? written : inHand.peek().message().getOffset();
    takeChunks(fileEnd == hashed);
    return takesChunks ? inHand.poll() : null;
  }

  private synchronized void takeChunks(boolean now) {
    takesChunks = now;
    notifyAll();
  }

  /** Hash one block of the file at most; false when it is shorter than it should be. */
  private boolean readBack() throws IOException {
    block.clear().limit((int) Math.min(fileEnd - hashed, BLOCK));
    if (file.read(block, hashed) < 0) {
      return false;
    }
    hash(block.flip());
    return true;
  }

  private void hash(ByteBuffer data) throws IOException {
    crc.update(data.duplicate());
    int end = data.limit();
    while (data.position() < end) {
      while (digests.isEmpty() || hashed >= pieceEnd) {
        beginPiece();
      }
      int count = (int) Math.min(end - data.position(), pieceEnd - hashed);
      data.limit(data.position() + count);
      digests.get(digests.size() - 1).update(data);
      data.limit(end);
      hashed += count;
    }
  }

  private void beginPiece() throws IOException {
    Source.Piece piece = source.pieces().get(digests.size());
    MessageDigest digest = sha256();
    update(digest, 0, piece.head());
    digests.add(digest);
    pieceEnd += piece.bytes();
  }

  private boolean holds(Source.Piece piece, MessageDigest digest)
      throws IOException, DamageException {
    if (piece.sha256().isEmpty()) {
      return false;
    }
    update(digest, source.total() - piece.tail(), source.total());
    if (piece.sha256().equals(ByteString.copyFrom(digest.digest()))) {
      return true;
    }
    if (piece.certain()) {
      throw new DamageException(piece.name() + " does not match its SHA-256");
    }
    return false;
  }

  private void update(MessageDigest digest, long start, long end) throws IOException {
    ByteBuffer bytes = ByteBuffer.allocate((int) Math.min(end - start, BLOCK));
    long position = start;
    while (position < end) {
      bytes.clear().limit((int) Math.min(end - position, BLOCK));
      int count = file.read(bytes, position);
      if (count < 0) {
        return;
      }
      digest.update(bytes.flip());
      position += count;
    }
  }

  private static MessageDigest sha256() {
    try {
      return MessageDigest.getInstance("SHA-256");
    } catch (NoSuchAlgorithmException impossible) {
      throw new IllegalStateException("every Java platform has SHA-256", impossible);
    }
  }
}
