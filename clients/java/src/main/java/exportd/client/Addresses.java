package exportd.client;

import java.util.regex.Pattern;

/** What an address says about where it leads. */
final class Addresses {
  // A prefix alone would not do: localhost.example.com is another machine.
  private static final Pattern LOOPBACK =
      Pattern.compile(
          "unix:.*|(dns:(///?)?)?(localhost|127(\\.\\d{1,3}){3}|\\[::1\\])(:\\d+)?",
          Pattern.CASE_INSENSITIVE);

  private Addresses() {}

  /** Whether it is certainly this machine. */
  static boolean isLoopback(String address) {
    return LOOPBACK.matcher(address).matches();
  }
}
