package exportd.client;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import com.google.protobuf.ByteString;
import exportd.v1.Job;
import exportd.v1.Manifest;
import exportd.v1.Part;
import exportd.v1.StreamDownloadResponse;
import java.nio.ByteBuffer;
import java.nio.charset.StandardCharsets;
import java.nio.file.Path;
import java.security.MessageDigest;
import java.util.OptionalInt;
import java.util.zip.CRC32C;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.io.TempDir;

class VerifierTest {
  @TempDir Path directory;

  @Test
  void partsAreProvenByPuttingBackWhatTheJoinedFileCarriesOnce() throws Exception {
    Source source = joined("<h>one<t>", "<h>two<t>", "<h>three<t>");
    assertEquals(Download.VerifiedBy.SHA256, verify(source, "<h>onetwothree<t>"));
  }

  @Test
  void anotherHeaderOfTheSameLengthLeavesItToTheChecksumOfTheWhole() throws Exception {
    Source source = joined("<h>one<t>", "<H>two<t>", "<h>three<t>");
    assertEquals(Download.VerifiedBy.CRC32C, verify(source, "<h>onetwothree<t>"));
  }

  @Test
  void damageIsFoundWhereverItIs() throws Exception {
    Source source = joined("<h>one<t>", "<h>two<t>", "<h>three<t>");
    for (String damaged :
        new String[] {"<x>onetwothree<t>", "<h>onetWothree<t>", "<h>onetwothree<t"}) {
      var error =
          assertThrows(Verifier.DamageException.class, () -> verify(source, damaged), damaged);
      assertTrue(error.getMessage().contains("should be") || error.getMessage().contains("match"));
    }
  }

  @Test
  void anEmptyFileIsProvenToo() throws Exception {
    assertEquals(Download.VerifiedBy.SHA256, verify(joined(""), ""));
  }

  @Test
  void bytesInHandAndThoseOfAnEarlierDownloadAreHashedInTheirOrder() throws Exception {
    String content = "<h>one" + "two".repeat(100) + "three<t>";
    Source source = joined("<h>one<t>", "<h>" + "two".repeat(100) + "<t>", "<h>three<t>");
    for (int resumed : new int[] {0, 1, 7, content.length() - 1}) {
      assertEquals(Download.VerifiedBy.SHA256, verifyChunks(source, content, resumed, 5));
    }
  }

  @Test
  void damageInHandIsFound() throws Exception {
    Source source = joined("<h>one<t>", "<h>two<t>");
    assertThrows(Verifier.DamageException.class, () -> verifyChunks(source, "<h>onetWo<t>", 2, 3));
  }

  /** As it comes after so many bytes of an earlier download: in chunks that are still in hand. */
  private Download.VerifiedBy verifyChunks(Source source, String content, int resumed, int size)
      throws Exception {
    byte[] bytes = content.getBytes(StandardCharsets.UTF_8);
    Chunk.Marshaller chunks = new Chunk.Marshaller();
    try (PartialFile file = PartialFile.open(directory.resolve("out"), directory.resolve(".part"));
        Verifier verifier = new Verifier(source, file, chunks)) {
      file.truncate(0);
      file.write(ByteBuffer.wrap(bytes, 0, resumed), 0);
      verifier.written(resumed);
      for (int n = resumed; n < bytes.length; n += size) {
        ByteString data = ByteString.copyFrom(bytes, n, Math.min(size, bytes.length - n));
        var message = StreamDownloadResponse.newBuilder().setOffset(n).setData(data).build();
        Chunk chunk = chunks.parse(message.toByteString().newInput());
        file.write(chunk.data(), n);
        verifier.written(chunk);
      }
      return verifier.finish();
    }
  }

  private Download.VerifiedBy verify(Source source, String content) throws Exception {
    byte[] bytes = content.getBytes(StandardCharsets.UTF_8);
    try (PartialFile file = PartialFile.open(directory.resolve("out"), directory.resolve(".part"));
        Verifier verifier = new Verifier(source, file, new Chunk.Marshaller())) {
      file.truncate(0);
      for (int n = 0; n < bytes.length; n++) { // as it arrives
        file.write(ByteBuffer.wrap(bytes, n, 1), n);
        verifier.written(n + 1);
      }
      verifier.written(source.total()); // lets it see where a short file ends
      return verifier.finish();
    }
  }

  /** What a manifest says of parts with a header and a trailer of three bytes each. */
  private static Source joined(String... parts) throws Exception {
    StringBuilder whole = new StringBuilder();
    Manifest.Builder manifest = Manifest.newBuilder().setJoinable(true);
    for (int n = 0; n < parts.length; n++) {
      byte[] bytes = parts[n].getBytes(StandardCharsets.UTF_8);
      manifest.addParts(
          Part.newBuilder()
              .setIndex(n)
              .setBytes(bytes.length)
              .setPrefixBytes(3)
              .setSuffixBytes(3)
              .setSha256(ByteString.copyFrom(MessageDigest.getInstance("SHA-256").digest(bytes))));
      whole.append(
          parts[n],
          n == 0 ? 0 : 3,
          n == parts.length - 1 ? parts[n].length() : parts[n].length() - 3);
    }
    byte[] bytes = whole.toString().getBytes(StandardCharsets.UTF_8);
    CRC32C crc = new CRC32C();
    crc.update(bytes);
    manifest.setBytes(bytes.length).setCrc32C((int) crc.getValue());
    if (parts.length == 1) {
      manifest.setSha256(manifest.getParts(0).getSha256());
    }
    return Source.of(Job.newBuilder().setManifest(manifest).build(), OptionalInt.empty());
  }
}
