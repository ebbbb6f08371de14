package exportd.client;

import java.nio.file.Path;

/**
 * A finished download.
 *
 * @param path the file
 * @param bytes its size
 * @param sha256 of the file, in hex; empty when several parts were joined, which are verified each
 * @param crc32c of the file
 * @param verifiedBy what vouches for every byte
 * @param resumed bytes that were there from an earlier try
 */
public record Download(
    Path path, long bytes, String sha256, int crc32c, VerifiedBy verifiedBy, long resumed) {
  /** What vouches for every byte of a download. */
  public enum VerifiedBy {
    /** SHA-256, of the file or of each part in it. */
    SHA256,
    /**
     * CRC32C of the whole: a part's header could not be told from the joined file, so that its
     * SHA-256 could not be checked.
     */
    CRC32C
  }
}
