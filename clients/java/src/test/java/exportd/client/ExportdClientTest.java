package exportd.client;

import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

import io.grpc.ChannelCredentials;
import io.grpc.ChoiceChannelCredentials;
import io.grpc.InsecureChannelCredentials;
import io.grpc.TlsChannelCredentials;
import java.util.List;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.ValueSource;

class ExportdClientTest {
  @ParameterizedTest
  @ValueSource(strings = {"exports.example.com:443", "localhost.example.com:1", "127.0.0.1.nip:1"})
  void aKeyIsNotSentInPlaintextToAnotherMachineUnlessAskedTo(String address) {
    ExportdClient.Builder builder = ExportdClient.builder(address).plaintext().token("secret");
    var refusal = assertThrows(IllegalArgumentException.class, builder::build);
    assertTrue(refusal.getMessage().contains("TLS"), refusal.getMessage());
    assertFalse(refusal.getMessage().contains("secret"), refusal.getMessage());
    builder.allowPlaintextToken().build().close();
  }

  @Test
  void aKeyGoesOnlyWithCredentialsThatAreTlsForCertain() {
    ChannelCredentials tls = TlsChannelCredentials.create();
    ChannelCredentials insecure = InsecureChannelCredentials.create();
    ExportdClient.Builder builder = ExportdClient.builder("exports.example.com:443").token("k");
    for (ChannelCredentials own :
        List.of(
            ChoiceChannelCredentials.create(insecure),
            ChoiceChannelCredentials.create(tls, insecure))) {
      builder.credentials(own);
      assertThrows(IllegalArgumentException.class, builder::build);
    }
    builder.credentials(ChoiceChannelCredentials.create(tls)).build().close();
  }

  @ParameterizedTest
  @ValueSource(strings = {"localhost:1", "127.0.0.1:1", "[::1]:1", "dns:///localhost:1"})
  void aKeyMayStayOnThisMachine(String address) {
    ExportdClient.builder(address).plaintext().token("secret").build().close();
  }

  @ParameterizedTest
  @ValueSource(strings = {"", "two words", "with its newline\n", "schlüssel"})
  void aKeyThatCannotBeOneIsRefusedAtOnce(String key) {
    ExportdClient.Builder builder = ExportdClient.builder("localhost:1");
    assertThrows(IllegalArgumentException.class, () -> builder.token(key));
  }

  @Test
  void anEmptyAddressIsRefusedAtOnce() {
    assertThrows(IllegalArgumentException.class, () -> ExportdClient.builder(" "));
  }
}
