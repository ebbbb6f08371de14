package exportd.client;

import java.util.Objects;
import java.util.OptionalInt;

/**
 * How to download. {@code DownloadOptions.DEFAULT.withPart(2).withOverwrite(true)}
 *
 * @param part index of the one part to download; empty: the whole output as one file
 * @param overwrite whether a file that is there is replaced; otherwise it is an error
 * @param progress told after each piece, on the thread that downloads
 */
public record DownloadOptions(OptionalInt part, boolean overwrite, Progress progress) {
  /** The whole output, to a new file. */
  public static final DownloadOptions DEFAULT =
      new DownloadOptions(OptionalInt.empty(), false, (done, total) -> {});

  /** Told how far a download is. */
  @FunctionalInterface
  public interface Progress {
    /** {@code done} of {@code total} bytes are there. */
    void at(long done, long total);
  }

  public DownloadOptions {
    Objects.requireNonNull(part, "part");
    Objects.requireNonNull(progress, "progress");
    if (part.isPresent() && part.getAsInt() < 0) {
      throw new IllegalArgumentException("part is " + part.getAsInt() + "; give 0 or more");
    }
  }

  /** The same, with one part only. */
  public DownloadOptions withPart(int index) {
    return new DownloadOptions(OptionalInt.of(index), overwrite, progress);
  }

  /** The same, replacing a file that is there or not. */
  public DownloadOptions withOverwrite(boolean wanted) {
    return new DownloadOptions(part, wanted, progress);
  }

  /** The same, telling how far it is. */
  public DownloadOptions withProgress(Progress told) {
    return new DownloadOptions(part, overwrite, told);
  }
}
