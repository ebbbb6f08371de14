package exportd.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

import java.nio.charset.StandardCharsets;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;

class FileNamesTest {
  @ParameterizedTest
  @CsvSource({
    "out.csv, out.csv",
    "../../etc/passwd, passwd",
    "C:\\Windows\\evil.dll, evil.dll",
    "C:evil.dll, evil.dll",
    ".bashrc, bashrc",
    "..., export",
    "'', export",
    "dir/, export",
    "'a\u0000b\n\u202Egpj.exe', abgpj.exe",
    "größe 1.csv, größe 1.csv",
  })
  void aNameStaysInItsDirectory(String given, String safe) {
    assertEquals(safe, FileNames.safe(given, "export"));
  }

  @Test
  void aLongNameKeepsItsEndWhichHasTheExtension() {
    String safe = FileNames.safe("ü".repeat(300) + ".csv", "export");
    assertTrue(safe.endsWith("ü.csv"), safe);
    assertEquals(180, safe.getBytes(StandardCharsets.UTF_8).length);
  }
}
