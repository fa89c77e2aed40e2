using System;
using System.Linq;
using System.Numerics;

class Hello
{
    static int Main(string[] words)
    {
        var line = Console.ReadLine();
        if (BigInteger.Pow(2, 70).ToString().Length == 22)
            Console.WriteLine($"hello {line} {string.Join(",", words.Select(word => word))}");
        Console.Error.WriteLine("warned");
        return 3;
    }
}
