package exportd.client;

import com.google.protobuf.ByteString;
import exportd.v1.Job;
import exportd.v1.Manifest;
import exportd.v1.Part;
import java.util.ArrayList;
import java.util.List;
import java.util.OptionalInt;

/**
 * The bytes of one file: the whole output, or one part of it.
 *
 * @param total its size; -1 while the job has no output, which the server then tells the reason of
 * @param pieces what a SHA-256 is known for, in order; they cover the file
 */
record Source(
    String jobId,
    long generation,
    OptionalInt part,
    String fileName,
    long total,
    int crc32c,
    ByteString sha256,
    List<Piece> pieces) {

  /**
   * A stretch of the file that a SHA-256 is known for: of {@code bytes} bytes, after as many as
   * {@code head} of the file's first bytes and before as many as {@code tail} of its last. The
   * joined file carries header and trailer once, the parts each.
   */
  record Piece(String name, long bytes, ByteString sha256, long head, long tail) {
    /** Whether a mismatch can only be damage: the part's own header may have been another. */
    boolean certain() {
      return head == 0 && tail == 0;
    }
  }

  static Source of(Job job, OptionalInt wanted) {
    Manifest manifest = job.getManifest();
    OptionalInt index = wanted;
    if (index.isEmpty() && !manifest.getJoinable() && manifest.getPartsCount() == 1) {
      index = OptionalInt.of(manifest.getParts(0).getIndex());
    }
    for (Part part : manifest.getPartsList()) {
      if (index.isPresent() && index.getAsInt() == part.getIndex()) {
        return new Source(
            job.getJobId(),
            job.getGeneration(),
            index,
            part.getFileName(),
            part.getBytes(),
            part.getCrc32C(),
            part.getSha256(),
            whole(part.getBytes(), part.getSha256()));
      }
    }
    boolean served = job.hasManifest() && index.isEmpty() && manifest.getJoinable();
    return new Source(
        job.getJobId(),
        job.getGeneration(),
        index,
        manifest.getFileName(),
        served ? manifest.getBytes() : -1,
        manifest.getCrc32C(),
        manifest.getSha256(),
        pieces(manifest));
  }

  private static List<Piece> pieces(Manifest manifest) {
    List<Part> parts = manifest.getPartsList();
    if (parts.size() < 2) {
      return whole(manifest.getBytes(), manifest.getSha256());
    }
    Part first = parts.get(0);
    Part last = parts.get(parts.size() - 1);
    List<Piece> pieces = new ArrayList<>();
    long total = 0;
    for (Part part : parts) {
      long head = part == first ? 0 : part.getPrefixBytes();
      long tail = part == last ? 0 : part.getSuffixBytes();
      long bytes = part.getBytes() - head - tail;
      // Headers of other lengths hold other bytes: there is nothing to rebuild the part from.
      boolean rebuildable =
          (head == 0 || head == first.getPrefixBytes())
              && (tail == 0 || tail == last.getSuffixBytes());
      pieces.add(
          rebuildable
              ? new Piece("part " + part.getIndex(), bytes, part.getSha256(), head, tail)
              : new Piece("part " + part.getIndex(), bytes, ByteString.EMPTY, 0, 0));
      total += bytes;
    }
    boolean covers = total == manifest.getBytes();
    return covers && pieces.stream().allMatch(piece -> piece.bytes() >= 0)
        ? List.copyOf(pieces)
        : whole(manifest.getBytes(), ByteString.EMPTY);
  }

  private static List<Piece> whole(long bytes, ByteString sha256) {
    return List.of(new Piece("the file", bytes, sha256, 0, 0));
  }
}
