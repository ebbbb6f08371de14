package exportd.client;

import com.google.protobuf.ByteString;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.security.MessageDigest;
import java.security.NoSuchAlgorithmException;
import java.util.ArrayList;
import java.util.List;
import java.util.zip.CRC32C;

/**
 * Reads a file back and holds it against its checksums, on a thread of its own behind what is
 * written: hashing then costs no time of its own, and reads what the page cache still holds.
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

  private final Source source;
  private final PartialFile file;
  private final Thread thread = new Thread(this::run, "exportd-verify");
  private final List<MessageDigest> digests = new ArrayList<>();
  private final CRC32C crc = new CRC32C();
  private final ByteBuffer block = ByteBuffer.allocate(BLOCK);
  private long pieceEnd;
  private long hashed;

  // Guarded by this.
  private long written;
  private boolean closed;
  private IOException failure;

  Verifier(Source source, PartialFile file) {
    this.source = source;
    this.file = file;
    thread.setDaemon(true);
    thread.start();
  }

  /** So many bytes are in the file. */
  synchronized void written(long bytes) {
    written = bytes;
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
        long limit = awaitMore();
        if (limit <= hashed || !advance(limit)) {
          return;
        }
      }
    } catch (IOException error) {
      synchronized (this) {
        failure = error;
      }
    } catch (InterruptedException nobodyDoes) {
      Thread.currentThread().interrupt();
    }
  }

  /** How far there is something to hash; no further than before when it is closed. */
  private synchronized long awaitMore() throws InterruptedException {
    while (written <= hashed && !closed) {
      wait();
    }
    return closed ? hashed : written;
  }

  /** Hash one block at most; false when the file is shorter than it should be. */
  private boolean advance(long limit) throws IOException {
    while (digests.isEmpty() || hashed >= pieceEnd) {
      beginPiece();
    }
    long wanted = Math.min(limit, pieceEnd) - hashed;
    block.clear().limit((int) Math.min(wanted, BLOCK));
    int count = file.read(block, hashed);
    if (count < 0) {
      return false;
    }
    crc.update(block.array(), 0, count);
    digests.get(digests.size() - 1).update(block.array(), 0, count);
    hashed += count;
    return true;
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
    long position = start;
    while (position < end) {
      block.clear().limit((int) Math.min(end - position, BLOCK));
      int count = file.read(block, position);
      if (count < 0) {
        return;
      }
      digest.update(block.array(), 0, count);
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
