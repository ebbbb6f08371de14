package exportd.client;

import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.DirectoryIteratorException;
import java.nio.file.DirectoryStream;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.OptionalInt;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

/**
 * What a temporary file is called: {@code .NAME.JOB-GENERATION[-PART].part}, beside the target.
 * NAME is cut down to its end where the whole would be too long.
 */
final class PartialName {
  /** What file systems allow. */
  private static final int MAX_BYTES = 255;

  /** So that names of one job are cut alike, whatever its generation. */
  private static final int GENERATION_DIGITS = Long.toString(Long.MAX_VALUE).length();

  private final Path target;
  private final String prefix;
  private final long generation;
  private final String suffix;

  PartialName(Path target, String jobId, long generation, OptionalInt part) {
    String job = "." + FileNames.safe(jobId, "job") + "-";
    String end = (part.isPresent() ? "-" + part.getAsInt() : "") + ".part";
    int others = 1 + job.getBytes(StandardCharsets.UTF_8).length + end.length();
    int room = MAX_BYTES - others - GENERATION_DIGITS;
    this.target = target;
    this.prefix = "." + FileNames.shortened(target.getFileName().toString(), room) + job;
    this.generation = generation;
    this.suffix = end;
  }

  Path path() {
    return target.resolveSibling(prefix + generation + suffix);
  }

  /**
   * Remove what earlier generations of the same output left, which nothing will complete. What
   * cannot be removed is in nobody's way.
   */
  void removeOlder() {
    Path directory = target.toAbsolutePath().getParent();
    try (DirectoryStream<Path> older = Files.newDirectoryStream(directory, this::isOlder)) {
      for (Path path : older) {
        remove(path);
      }
    } catch (IOException | DirectoryIteratorException unreadable) {
      return;
    }
  }

  private boolean isOlder(Path path) {
    // The most digits that surely are a number.
    Matcher name =
        Pattern.compile(Pattern.quote(prefix) + "(\\d{1,18})" + Pattern.quote(suffix))
            .matcher(path.getFileName().toString());
    return name.matches() && Long.parseLong(name.group(1)) < generation;
  }

  private void remove(Path path) {
    try (PartialFile file = PartialFile.open(target, path)) {
      file.delete();
    } catch (IOException held) {
      return; // by a download that will notice
    }
  }
}
