package exportd.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;
import static org.junit.jupiter.api.Assumptions.assumeTrue;

import java.io.IOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.FileSystemException;
import java.nio.file.Files;
import java.nio.file.Path;
import java.util.OptionalInt;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;

class PartialFileTest {
  @TempDir Path directory;

  @Test
  void aDownloadThatIsRefusedDoesNotTakeTheLockOfTheFirst() throws Exception {
    Path path = directory.resolve(".part");
    try (PartialFile first = PartialFile.open(directory.resolve("out"), path)) {
      Path link = Files.createSymbolicLink(directory.resolve("link"), directory);
      for (Path same : new Path[] {path, link.resolve(".part"), link.resolve("./.part")}) {
        assertThrows(
            FileSystemException.class, () -> PartialFile.open(directory.resolve("out"), same));
      }
      assertTrue(isLockedBySomebody(path));
      assertEquals(0, first.size());
    }
    PartialFile.open(directory.resolve("out"), path).close();
  }

  @Test
  void namesAsLongAsAFileSystemTakesThemWork() throws Exception {
    String job = "01900000-0000-7000-8000-00000000abcd";
    for (String name : new String[] {"n".repeat(251) + ".csv", "ü".repeat(118) + ".csv"}) {
      Path target = directory.resolve(name);
      var partial = new PartialName(target, job, Long.MAX_VALUE, OptionalInt.of(7));
      try (PartialFile file = PartialFile.open(target, partial.path())) {
        file.publish(false);
      }
      assertTrue(Files.exists(target));
    }
    Path plain = new PartialName(Path.of("out.csv"), job, 3, OptionalInt.of(7)).path();
    assertEquals(Path.of(".out.csv." + job + "-3-7.part"), plain);
  }

  @Test
  void whatOlderGenerationsLeftIsRemovedAndNothingElse() throws Exception {
    Path target = directory.resolve("out.csv");
    String[] others = {
      ".out.csv.job-12-0.part", // of one part
      ".out.csv.job-101.part", // newer
      ".out.csv.jab-12.part", // another job
      ".out_csv.job-12.part", // another file
    };
    for (String name : others) {
      Files.createFile(directory.resolve(name));
    }
    Path old = Files.createFile(directory.resolve(".out.csv.job-12.part"));
    Path held = directory.resolve(".out.csv.job-13.part");
    try (PartialFile elsewhere = PartialFile.open(target, held)) {
      new PartialName(target, "job", 100, OptionalInt.empty()).removeOlder();
      assertEquals(0, elsewhere.size());
    }
    assertTrue(Files.notExists(old));
    assertTrue(Files.exists(held), "another download works on it");
    for (String name : others) {
      assertTrue(Files.exists(directory.resolve(name)), name);
    }
  }

  /** What the system says: this process would be told of its own lock in any case. */
  private static boolean isLockedBySomebody(Path path) throws IOException {
    Path locks = Path.of("/proc/locks");
    assumeTrue(Files.isReadable(locks));
    String end = ":" + Files.getAttribute(path, "unix:ino") + " 0 EOF";
    return Files.readString(locks, StandardCharsets.UTF_8).lines().anyMatch(l -> l.endsWith(end));
  }
}
