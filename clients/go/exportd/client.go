// Package exportd is a client of exportd, the dataset export service.
//
// A [Client] has the methods of the contract's ExportService, and two of its own for what
// takes more than one call: [Client.Watch] and [Client.Download], which go on where they
// were when the connection breaks or the server restarts.
package exportd

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	_ "embed"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/status"

	exportdv1 "exportd.internal/go/exportd/v1"
)

// serviceConfig says which calls gRPC tries again by itself, and how often. It is made from
// the contract: calls that are not safe to repeat are not in it.
//
//go:embed service_config.json
var serviceConfig string

// callTimeout is how long a call with one answer may take, gRPC's own retries included,
// unless its context has a deadline.
const callTimeout = 30 * time.Second

// maxMessage is the largest message taken, in bytes. A download carries up to 2 MiB a
// message, a page of 1 000 jobs can be larger.
const maxMessage = 16 << 20

const (
	// streamWindow is how many bytes of a stream may be under way. With less, the server
	// waits for the client on a fast network; gRPC would find out by itself, up to the same
	// figure, and takes a good part of a short download for that.
	streamWindow = 16 << 20
	// readBuffer holds what one read from the socket may bring.
	readBuffer = 256 << 10
)

// Client calls one exportd service. It may be used by several goroutines at once.
type Client struct {
	exportdv1.ExportServiceClient
	// streams has a connection of its own, on which gRPC tries nothing again: Watch and
	// Download do, and the attempts of both would multiply.
	streams exportdv1.ExportServiceClient
	conns   []*grpc.ClientConn
	timeout time.Duration
	stall   time.Duration
}

// Option changes how [NewClient] reaches the server.
type Option func(*options) error

type options struct {
	transport      credentials.TransportCredentials
	token          string
	tokenInTheOpen bool
	dial           []grpc.DialOption
}

// NewClient makes a client of the service at address, a "host:port" or any other gRPC
// target. It speaks TLS and trusts the system's authorities unless an option says
// otherwise. Nothing is dialled before the first call.
func NewClient(address string, opts ...Option) (*Client, error) {
	var o options
	for _, opt := range opts {
		if err := opt(&o); err != nil {
			return nil, err
		}
	}
	if o.transport == nil {
		o.transport = credentials.NewTLS(&tls.Config{MinVersion: tls.VersionTLS12})
	}
	plaintext := o.transport.Info().SecurityProtocol == insecure.NewCredentials().Info().SecurityProtocol
	loopback := isLoopback(address)
	if o.token != "" && plaintext && !loopback && !o.tokenInTheOpen {
		return nil, fmt.Errorf("token: would go to %s unencrypted; use TLS, or allow it with WithPlaintextToken", address)
	}
	dial := []grpc.DialOption{
		grpc.WithTransportCredentials(o.transport),
		grpc.WithDefaultServiceConfig(serviceConfig),
		// Whoever answers for the name in DNS shall not change the contract's retries.
		grpc.WithDisableServiceConfig(),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
		// Notice a peer that vanished without a word. Pings go out only while a call is
		// open, and rarely enough for a server with gRPC's default ping policy.
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 10 * time.Second}),
		// A restarted server is found soon after it is back.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
			MinConnectTimeout: 20 * time.Second,
		}),
	}
	if loopback {
		// A proxy from the environment cannot know this machine's own ports.
		dial = append(dial, grpc.WithNoProxy())
	}
	if o.token != "" {
		dial = append(dial, grpc.WithPerRPCCredentials(bearer{token: o.token, encrypted: !plaintext}))
	}
	client := &Client{timeout: callTimeout, stall: stallTimeout}
	calls, err := grpc.NewClient(address, slices.Concat(dial, []grpc.DialOption{
		grpc.WithChainUnaryInterceptor(client.limit),
	}, o.dial)...)
	if err != nil {
		return nil, fmt.Errorf("address %q: %w", address, err)
	}
	streams, err := grpc.NewClient(address, slices.Concat(dial, []grpc.DialOption{
		grpc.WithDisableRetry(),
		grpc.WithStaticStreamWindowSize(streamWindow),
		grpc.WithStaticConnWindowSize(streamWindow),
		grpc.WithReadBufferSize(readBuffer),
	}, o.dial)...)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("address %q: %w", address, err), calls.Close())
	}
	client.ExportServiceClient = exportdv1.NewExportServiceClient(calls)
	client.streams = exportdv1.NewExportServiceClient(streams)
	client.conns = []*grpc.ClientConn{calls, streams}
	return client, nil
}

// Close ends the connections, and the calls that are under way.
func (c *Client) Close() error {
	var errs []error
	for _, conn := range c.conns {
		errs = append(errs, conn.Close())
	}
	return errors.Join(errs...)
}

// limit ends a call that would wait for ever. It is a [grpc.UnaryClientInterceptor].
func (c *Client) limit(
	ctx context.Context, method string, request, reply any,
	conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption,
) error {
	call := func(ctx context.Context) error {
		return invoke(ctx, method, request, reply, conn, opts...)
	}
	if _, limited := ctx.Deadline(); limited {
		return call(ctx)
	}
	return c.within(ctx, call)
}

// within gives call the time that a call has.
func (c *Client) within(ctx context.Context, call func(context.Context) error) error {
	limited, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	err := call(limited)
	// By the clock: gRPC may tell of the deadline before the context's timer has run.
	deadline, _ := limited.Deadline()
	theirs, has := ctx.Deadline()
	ours := (!has || deadline.Before(theirs)) && !time.Now().Before(deadline)
	if status.Code(err) == codes.DeadlineExceeded && ours && ctx.Err() == nil {
		return status.Errorf(codes.DeadlineExceeded, "the server did not answer within %g s: %s",
			c.timeout.Seconds(), status.Convert(err).Message())
	}
	return err
}

// WithPlaintext speaks without encryption.
func WithPlaintext() Option { return WithTransportCredentials(insecure.NewCredentials()) }

// WithCAFile speaks TLS and trusts the authorities in a PEM file instead of the system's.
func WithCAFile(path string) Option {
	return func(o *options) error {
		pem, err := os.ReadFile(path)
		if err != nil {
			return fmt.Errorf("CA file: %w", err)
		}
		roots := x509.NewCertPool()
		if !roots.AppendCertsFromPEM(pem) {
			return fmt.Errorf("CA file: %s holds no certificate; give a PEM file", path)
		}
		return o.setTransport(credentials.NewTLS(&tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}))
	}
}

// WithTransportCredentials secures the connection as creds say, for example with a
// certificate of the client's own.
func WithTransportCredentials(creds credentials.TransportCredentials) Option {
	return func(o *options) error { return o.setTransport(creds) }
}

// WithToken sends an API key or another token as "authorization: Bearer" with every call.
func WithToken(token string) Option {
	return func(o *options) error {
		if token == "" || strings.ContainsFunc(token, isNotVisible) {
			return errors.New("token is empty or has a blank in it; give it as it was issued, on one line")
		}
		o.token = token
		return nil
	}
}

// isNotVisible tells whether a character is anything but visible ASCII.
func isNotVisible(r rune) bool { return r <= ' ' || r > '~' }

// WithPlaintextToken lets the token go over an unencrypted connection that leaves this
// machine. Only for networks that something else encrypts.
func WithPlaintextToken() Option {
	return func(o *options) error {
		o.tokenInTheOpen = true
		return nil
	}
}

// WithDialOptions adds options of the channel. They win over the client's own.
func WithDialOptions(opts ...grpc.DialOption) Option {
	return func(o *options) error {
		o.dial = append(o.dial, opts...)
		return nil
	}
}

func (o *options) setTransport(creds credentials.TransportCredentials) error {
	if o.transport != nil {
		return errors.New("transport: is given twice; use one of WithPlaintext, WithCAFile and WithTransportCredentials")
	}
	o.transport = creds
	return nil
}

// bearer sends a token with each call; gRPC refuses it where encryption is required and
// the connection has none.
type bearer struct {
	token     string
	encrypted bool
}

func (b bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + b.token}, nil
}

func (b bearer) RequireTransportSecurity() bool { return b.encrypted }

// isLoopback tells whether a gRPC target can only be this machine.
func isLoopback(target string) bool {
	if strings.HasPrefix(target, "unix:") || strings.HasPrefix(target, "unix-abstract:") {
		return true
	}
	for _, scheme := range []string{"dns:///", "passthrough:///", "dns:", "passthrough:"} {
		if rest, found := strings.CutPrefix(target, scheme); found {
			target = rest
			break
		}
	}
	host, _, err := net.SplitHostPort(target)
	if err != nil {
		host = strings.Trim(target, "[]")
	}
	if strings.EqualFold(host, "localhost") {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.Unmap().IsLoopback()
}
