package exportd.client;

import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.channels.ClosedByInterruptException;
import java.nio.channels.FileChannel;
import java.nio.channels.FileLock;
import java.nio.channels.OverlappingFileLockException;
import java.nio.file.FileAlreadyExistsException;
import java.nio.file.FileSystemException;
import java.nio.file.Files;
import java.nio.file.LinkOption;
import java.nio.file.NoSuchFileException;
import java.nio.file.Path;
import java.nio.file.StandardCopyOption;
import java.nio.file.StandardOpenOption;
import java.nio.file.attribute.BasicFileAttributes;
import java.util.Optional;
import java.util.Set;
import java.util.concurrent.ConcurrentHashMap;

/**
 * The temporary file of one download, beside the final one, held by one download at a time. Its
 * name tells what it holds the beginning of, so that a later download can go on with it: everything
 * in it is hashed before it gets the final name.
 */
final class PartialFile implements AutoCloseable {
  /**
   * What this process holds. Looked up before a file is opened: closing it would drop the lock that
   * another channel of the same process has on it.
   */
  private static final Set<Path> HELD = ConcurrentHashMap.newKeySet();

  private final Path target;
  private final Path path;
  private final Path held;
  private final FileChannel channel;

  private PartialFile(Path target, Path path, Path held, FileChannel channel) {
    this.target = target;
    this.path = path;
    this.held = held;
    this.channel = channel;
  }

  /**
   * Open and lock it.
   *
   * @param path of the temporary file; names the bytes
   * @throws FileSystemException another download holds it
   */
  static PartialFile open(Path target, Path path) throws IOException {
    // By whatever links the directory is reached.
    Path held = path.toAbsolutePath().getParent().toRealPath().resolve(path.getFileName());
    if (!HELD.add(held)) {
      throw held(path);
    }
    try {
      return new PartialFile(target, path, held, lock(path));
    } catch (IOException | RuntimeException error) {
      HELD.remove(held);
      throw error;
    }
  }

  private static FileChannel lock(Path path) throws IOException {
    while (true) {
      Optional<Object> before = identity(path);
      FileChannel channel =
          FileChannel.open(
              path,
              StandardOpenOption.CREATE,
              StandardOpenOption.READ,
              StandardOpenOption.WRITE,
              LinkOption.NOFOLLOW_LINKS);
      try {
        if (!isLocked(channel)) {
          throw held(path);
        }
        // Who held the lock before may have given the file its final name meanwhile, and another
        // may have begun a new one. A file that was just made is looked at in the next round.
        if (before.isPresent() && before.equals(identity(path))) {
          return channel;
        }
        channel.close();
      } catch (IOException | RuntimeException error) {
        channel.close();
        throw error;
      }
    }
  }

  /** Tells a file from others; empty when there is none. */
  private static Optional<Object> identity(Path path) throws IOException {
    try {
      Object key =
          Files.readAttributes(path, BasicFileAttributes.class, LinkOption.NOFOLLOW_LINKS)
              .fileKey();
      return Optional.of(key == null ? path : key); // Windows has none, and keeps names in use
    } catch (NoSuchFileException none) {
      return Optional.empty();
    }
  }

  private static boolean isLocked(FileChannel channel) throws IOException {
    try {
      FileLock lock = channel.tryLock();
      return lock != null;
    } catch (OverlappingFileLockException thisProcess) {
      return false; // by another class loader
    }
  }

  private static FileSystemException held(Path path) {
    return new FileSystemException(
        path.toString(), null, "another download writes it; wait for it, or use other paths");
  }

  long size() throws IOException {
    return channel.size();
  }

  void truncate(long size) throws IOException {
    channel.truncate(size);
  }

  /** Fail now when the disk has no room for so many more bytes, and not after hours. */
  void reserve(long bytes) throws IOException {
    long free = Files.getFileStore(path).getUsableSpace();
    if (free < bytes) {
      throw new FileSystemException(
          path.toString(), null, "no space left: " + bytes + " bytes to come, " + free + " free");
    }
  }

  /** Write all that remains in the buffer. */
  void write(ByteBuffer data, long position) throws IOException {
    long next = position;
    while (data.hasRemaining()) {
      next += channel.write(data, next);
    }
  }

  /** Read at least one byte into the buffer; -1 at the end. */
  int read(ByteBuffer buffer, long position) throws IOException {
    return channel.read(buffer, position);
  }

  /**
   * Give the file its name, durably.
   *
   * @throws FileAlreadyExistsException there is one, and it may not be replaced
   */
  void publish(boolean overwrite) throws IOException {
    channel.force(true);
    if (overwrite) {
      Files.move(path, target, StandardCopyOption.REPLACE_EXISTING, StandardCopyOption.ATOMIC_MOVE);
    } else {
      nameAnew();
    }
    syncDirectory();
  }

  void delete() throws IOException {
    Files.deleteIfExists(path);
  }

  /** Unlocks it. */
  @Override
  public void close() throws IOException {
    try {
      channel.close();
    } finally {
      HELD.remove(held);
    }
  }

  /** A hard link fails when the name is taken, which a rename does not. */
  private void nameAnew() throws IOException {
    try {
      Files.createLink(target, path);
    } catch (FileAlreadyExistsException taken) {
      throw exists(target);
    } catch (UnsupportedOperationException | FileSystemException noLinks) {
      Files.move(path, target);
      return;
    }
    Files.delete(path);
  }

  private void syncDirectory() throws IOException {
    if (System.getProperty("os.name").startsWith("Windows")) {
      return; // cannot open directories, and needs not
    }
    // The file has its name: an interrupt is too late, and left to the thread's next wait.
    boolean interrupted = false;
    boolean done = false;
    while (!done) {
      interrupted |= Thread.interrupted();
      try (FileChannel directory =
          FileChannel.open(target.toAbsolutePath().getParent(), StandardOpenOption.READ)) {
        directory.force(true);
        done = true;
      } catch (ClosedByInterruptException again) {
        done = false;
      }
    }
    if (interrupted) {
      Thread.currentThread().interrupt();
    }
  }

  static FileAlreadyExistsException exists(Path path) {
    return new FileAlreadyExistsException(
        path.toString(), null, "it exists; give another path, or allow overwriting");
  }
}
