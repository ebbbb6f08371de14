package exportd.client;

import java.nio.charset.StandardCharsets;

/** File names that a server gave. */
final class FileNames {
  private static final int MAX_BYTES = 180;

  private FileNames() {}

  /**
   * A name that stays in its directory, whatever the server said. Only the last component counts;
   * control and format characters (which can hide or turn text around) and leading dots go.
   */
  static String safe(String name, String fallback) {
    String last = name.substring(Math.max(name.lastIndexOf('/'), name.lastIndexOf('\\')) + 1);
    // A colon would name a drive or a stream of another file on Windows.
    last = last.substring(last.lastIndexOf(':') + 1);
    StringBuilder kept = new StringBuilder();
    last.codePoints().filter(FileNames::isVisible).forEach(kept::appendCodePoint);
    String safe = kept.toString().strip().replaceFirst("^\\.+", "");
    safe = shortened(safe, MAX_BYTES);
    return safe.isEmpty() ? fallback : safe;
  }

  /** The end of a name, which has the extension, in so many bytes at most. */
  static String shortened(String name, int maxBytes) {
    String end = name;
    while (end.getBytes(StandardCharsets.UTF_8).length > maxBytes) {
      end = end.substring(end.offsetByCodePoints(0, 1));
    }
    return end;
  }

  private static boolean isVisible(int codePoint) {
    return switch (Character.getType(codePoint)) {
      case Character.CONTROL, Character.FORMAT, Character.SURROGATE -> false;
      default -> true;
    };
  }
}
