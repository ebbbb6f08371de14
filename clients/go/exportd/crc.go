package exportd

import "hash/crc32"

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// joinCRC gives the CRC32C of bytes that follow each other from the CRC32C of each and the
// length of the second, so that nothing is read twice.
//
// A CRC is a polynomial over GF(2) modulo the generator. To append n bytes is to multiply
// it by x^(8n); the conditioning of the two CRCs cancels out.
func joinCRC(first, second uint32, n int64) uint32 {
	for power := xToThe8; n > 0; n >>= 1 {
		if n&1 == 1 {
			first = multiply(first, power)
		}
		power = multiply(power, power)
	}
	return first ^ second
}

// xToThe8 is the polynomial x^8; the highest bit is the coefficient of x^0.
const xToThe8 uint32 = 1 << (31 - 8)

// multiply multiplies two polynomials modulo the generator.
func multiply(a, b uint32) (product uint32) {
	for bit := uint32(1 << 31); bit > 0; bit >>= 1 {
		if a&bit > 0 {
			product ^= b
		}
		carry := b & 1 // times x
		b >>= 1
		if carry == 1 {
			b ^= crc32.Castagnoli
		}
	}
	return product
}
