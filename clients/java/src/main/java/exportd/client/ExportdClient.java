package exportd.client;

import com.google.gson.Gson;
import com.google.gson.reflect.TypeToken;
import exportd.v1.ExportServiceGrpc;
import exportd.v1.ExportServiceGrpc.ExportServiceBlockingStub;
import exportd.v1.WatchJobRequest;
import io.grpc.ChannelCredentials;
import io.grpc.ChoiceChannelCredentials;
import io.grpc.CompositeChannelCredentials;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.ManagedChannelBuilder;
import io.grpc.Metadata;
import io.grpc.StatusRuntimeException;
import io.grpc.TlsChannelCredentials;
import io.grpc.stub.MetadataUtils;
import java.io.IOException;
import java.io.InputStream;
import java.io.InputStreamReader;
import java.io.Reader;
import java.io.UncheckedIOException;
import java.nio.charset.StandardCharsets;
import java.nio.file.Path;
import java.util.Map;
import java.util.Objects;
import java.util.concurrent.TimeUnit;

/**
 * A connection to exportd. Safe for use by several threads; nothing is dialled before the first
 * call.
 *
 * <p>Errors of calls are {@link StatusRuntimeException}; {@link Errors#reason} says which of
 * exportd's it is.
 */
public final class ExportdClient implements AutoCloseable {
  private static final int MAX_MESSAGE_BYTES = 16 * 1024 * 1024;
  private static final Metadata.Key<String> AUTHORIZATION =
      Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER);

  private final ManagedChannel calls;
  private final ManagedChannel streams;

  private ExportdClient(Builder builder) {
    // Watches and downloads resume by themselves, which gRPC's retries would only slow down; and
    // with a connection of their own a download does not delay other calls.
    calls =
        builder
            .channel()
            .defaultServiceConfig(serviceConfig())
            .enableRetry()
            .intercept(new DefaultDeadline())
            .build();
    streams = builder.channel().disableRetry().build();
    new Redial(calls).keep();
  }

  /**
   * A client for a server at {@code host:port}, over TLS with the system's roots unless told
   * otherwise.
   */
  public static Builder builder(String address) {
    return new Builder(address);
  }

  /**
   * The generated stub, for all calls. Those that are safe to repeat are retried by gRPC. A call
   * may take 30 s, unless it has a deadline of its own.
   */
  public ExportServiceBlockingStub stub() {
    return ExportServiceGrpc.newBlockingStub(calls);
  }

  /** The channel, for stubs of another kind. It carries the credentials and the limit of 30 s. */
  public ManagedChannel channel() {
    return calls;
  }

  /** Follow a job to its end, over broken connections and restarts of the server. */
  public JobStream watch(String jobId) {
    return watch(WatchJobRequest.newBuilder().setJobId(jobId).build());
  }

  /** As {@link #watch(String)}, with the request's other fields. */
  public JobStream watch(WatchJobRequest request) {
    return new JobStream(streams, request);
  }

  /**
   * Download a job's whole output to a new file; see {@link #download(String, Path,
   * DownloadOptions)}.
   */
  public Download download(String jobId, Path path) throws IOException {
    return download(jobId, path, DownloadOptions.DEFAULT);
  }

  /**
   * Download a job's output, or one part of it, and verify it. A broken connection is resumed. The
   * name appears last, when everything has been proven.
   *
   * @param path the file, or a directory that is there: then the server names the file
   * @throws java.nio.file.FileAlreadyExistsException there is one, and it may not be replaced
   * @throws IOException this machine's disk is full or refuses
   * @throws StatusRuntimeException the server refuses ({@code JOB_NOT_FINISHED}, {@code
   *     PARTS_NOT_JOINABLE} and so on), stayed away for longer than the retries, or sent what does
   *     not match its checksums ({@code DATA_LOSS})
   */
  public Download download(String jobId, Path path, DownloadOptions options) throws IOException {
    return new Downloader(stub(), streams).download(jobId, path, options);
  }

  /** Ends what is under way and hangs up. */
  @Override
  public void close() {
    calls.shutdownNow();
    streams.shutdownNow();
    try {
      if (calls.awaitTermination(5, TimeUnit.SECONDS)) {
        streams.awaitTermination(5, TimeUnit.SECONDS);
      }
    } catch (InterruptedException interrupt) {
      Thread.currentThread().interrupt();
    }
  }

  /** What the contract says about retries; Gson gives numbers as the doubles that gRPC wants. */
  private static Map<String, Object> serviceConfig() {
    try (InputStream resource = ExportdClient.class.getResourceAsStream("service_config.json");
        Reader reader =
            new InputStreamReader(
                Objects.requireNonNull(resource, "service_config.json"), StandardCharsets.UTF_8)) {
      return new Gson().fromJson(reader, new TypeToken<Map<String, Object>>() {}.getType());
    } catch (IOException unreadable) {
      throw new UncheckedIOException(unreadable);
    }
  }

  /** How to reach a server. */
  public static final class Builder {
    private final String address;
    private final boolean loopback;
    private ChannelCredentials credentials = TlsChannelCredentials.create();
    private boolean tokenOverPlaintext;
    private String token;

    private Builder(String address) {
      if (address.isBlank()) {
        throw new IllegalArgumentException("address is empty; give the server's host:port");
      }
      this.address = address;
      this.loopback = Addresses.isLoopback(address);
    }

    /** Without TLS. */
    public Builder plaintext() {
      credentials = InsecureChannelCredentials.create();
      return this;
    }

    /**
     * Over TLS, trusting the authorities in a PEM file instead of the system's.
     *
     * @throws IOException it cannot be read
     */
    public Builder caFile(Path pem) throws IOException {
      return credentials(TlsChannelCredentials.newBuilder().trustManager(pem.toFile()).build());
    }

    /** Over TLS as the credentials say, for instance with a certificate of the client's own. */
    public Builder credentials(ChannelCredentials own) {
      credentials = own;
      return this;
    }

    /** Send this API key or token with every call. */
    public Builder token(String text) {
      if (text.isEmpty() || !text.chars().allMatch(c -> c > ' ' && c < 0x7f)) {
        throw new IllegalArgumentException(
            "token is empty or has a blank in it; give it as it was issued, on one line");
      }
      token = text;
      return this;
    }

    /** Send the token over plaintext to another machine: everybody on the way can read it. */
    public Builder allowPlaintextToken() {
      tokenOverPlaintext = true;
      return this;
    }

    /**
     * The client.
     *
     * @throws IllegalArgumentException the key could travel in plaintext to another machine
     */
    public ExportdClient build() {
      if (token != null && !loopback && !tokenOverPlaintext && !isTls(credentials)) {
        throw new IllegalArgumentException(
            "token could be readable on the way to "
                + address
                + "; use TLS, or allowPlaintextToken()");
      }
      return new ExportdClient(this);
    }

    /** Whether it is certain: of credentials of other kinds nobody knows. */
    private static boolean isTls(ChannelCredentials own) {
      if (own instanceof CompositeChannelCredentials composite) {
        return isTls(composite.getChannelCredentials());
      }
      if (own instanceof ChoiceChannelCredentials choice) {
        return choice.getCredentialsList().stream().allMatch(Builder::isTls);
      }
      return own instanceof TlsChannelCredentials;
    }

    private ManagedChannelBuilder<?> channel() {
      ManagedChannelBuilder<?> builder =
          Grpc.newChannelBuilder(address, credentials)
              .maxInboundMessageSize(MAX_MESSAGE_BYTES)
              // Notices a peer that vanished without a word. Pings go out only during calls, and
              // rarely enough for a server with gRPC's default policy.
              .keepAliveTime(30, TimeUnit.SECONDS)
              .keepAliveTimeout(10, TimeUnit.SECONDS)
              .keepAliveWithoutCalls(false);
      if (loopback) {
        // A proxy from the environment cannot know this machine's own ports.
        builder.proxyDetector(target -> null);
      }
      if (token != null) {
        Metadata headers = new Metadata();
        headers.put(AUTHORIZATION, "Bearer " + token);
        builder.intercept(MetadataUtils.newAttachHeadersInterceptor(headers));
      }
      return builder;
    }
  }
}
